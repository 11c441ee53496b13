"""`rebpf alert`: read the topics as a consumer group and send alerts when a threshold is crossed.

`engine` and the modules that it imports decide without I/O; the others read and write Kafka, or are destinations.
"""
