"""The path of an event: ring buffer, encoder, Kafka or the spool, and the acknowledgement back.

`account` holds the main invariant, in `checkpoint`: a ring's position moves only past events that are safe.
"""
