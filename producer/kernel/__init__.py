"""The kernel side: compile, load and attach the BPF programs, and read their ring buffers and counters.

`loader_child` runs in a separate process. It and the modules it imports use only the standard library and bcc.
"""
