"""Events on disk, as Avro container files: the spool while Kafka is unavailable, and the quarantine."""
