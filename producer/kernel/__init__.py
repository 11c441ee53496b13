"""The kernel side: compile, load and attach the BPF programs, and read their ring buffers and counters.

`loader_child` runs in a process of its own and, with what it imports, uses the standard library and bcc alone.
"""
