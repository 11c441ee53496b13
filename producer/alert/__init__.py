"""`rebpf alert`: read the topics as a consumer group and send alerts when a threshold is crossed.

`windows`, `evaluate` and `silence` decide without I/O; the other modules read and write Kafka.
"""
