"""Schema ids, from a Confluent-compatible registry or from the cache of its earlier responses."""
