"""Kafka clients: the agent's sink, consumers, and the admin client."""
