"""What the `rebpf` commands other than `run`, `demo` and `alert` do.

One module for each command: it reads topics, the spool or the host, and prints.
"""
