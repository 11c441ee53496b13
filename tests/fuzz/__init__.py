"""Fuzzing: feeds mutated input to the code that reads it.

A target is a hypothesis strategy of examples and a check of one example. The default tests run a few examples of each,
the same at every run; `python -m tests.fuzz TARGET --seconds N` runs others for a given time. docs/reliability.md.
"""
