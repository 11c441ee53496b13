"""ReBPF's events for analysis in Python: `rebpf.read` returns an Arrow table.

import rebpf

flows = rebpf.read("export/", topic="tcp_flow")
events = rebpf.read(brokers="kafka-1:9092", topic="tcp_retransmit", since="1h")
"""

from producer.export.read import read

__all__ = ["read"]
