"""The `rebpf` command line: options, help, exit codes.

Each command reads its options here and calls one function of `commands`, `demo`, `alert` or `agent`.
Nothing imports this package.
"""
