"""The alerting consumer, `rebpf alert`: reads the topics as a Kafka consumer group, and tells what crosses a threshold."""
