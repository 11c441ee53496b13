"""The path of an event: ring buffer, encoder, Kafka or the spool, and the acknowledgement back.

`ledger` and `stream` hold the main invariant: a ring's position moves only past events that are safe.
"""
