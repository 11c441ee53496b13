"""Everything that speaks to Kafka: the sink, the consumers, the admin client, and librdkafka's settings."""
