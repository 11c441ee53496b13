"""The spool: events on disk while Kafka is unavailable, in order, as Avro container files."""
