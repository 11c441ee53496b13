"""The chaos run: a producer under traffic, everything around it fails at random, and an oracle counts what arrives.

python -m tests.chaos --minutes 60 --events-per-s 20000 --seed 7
"""
