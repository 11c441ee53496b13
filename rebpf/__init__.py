"""ReBPF's events for analysis in Python: `rebpf.read` returns an Arrow table.

import rebpf

flows = rebpf.read("export/", topic="tcp_flow")
events = rebpf.read(brokers="kafka-1:9092", topic="tcp_retransmit", since="1h")
"""

try:
    from producer.export.read import read
except ModuleNotFoundError as error:
    if error.name != "pyarrow":
        raise
    fix = "pip install '.[report]' in a checkout of ReBPF"
    raise ModuleNotFoundError(f"rebpf.read needs pyarrow: {fix}", name="pyarrow") from error

__all__ = ["read"]
