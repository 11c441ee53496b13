"""ReBPF: TCP transmit and retransmit events from the kernel to Kafka."""

__version__ = "0.1.0"
