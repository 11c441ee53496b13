"""From ring buffer rows to Avro messages, in C (native/) by a program made from the schema. No I/O."""
