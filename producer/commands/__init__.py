"""The `rebpf` commands other than `run`, `demo` and `alert`.

One module per command: it reads topics, the spool or the host, and prints.
"""
