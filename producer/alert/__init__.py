"""The alerting consumer, `rebpf alert`: reads the topics as a consumer group, and tells what crosses a threshold."""
