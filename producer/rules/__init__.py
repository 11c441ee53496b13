"""Capture rules: names resolved to numbers, the decision tables for the kernel, and `--explain`."""
