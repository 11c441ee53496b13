"""From ring buffer rows to Avro messages, whole columns at a time. No I/O."""
