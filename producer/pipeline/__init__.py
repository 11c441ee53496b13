"""The way of an event: ring buffer, encoder, then Kafka or the spool, and back again as an acknowledgement.

`ledger` and `stream` hold the main invariant: a ring's position moves only past events that are safe.
"""
