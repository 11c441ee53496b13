"""Real servers for tests, without containers: Apache Kafka, a schema registry, and independent readers."""
