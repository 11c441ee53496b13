"""The chaos run: a producer under traffic while everything around it fails at random. An oracle counts what arrives.

python -m tests.chaos --minutes 60 --events-per-s 20000 --seed 7
"""
