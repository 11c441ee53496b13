"""Sends TCP traffic over a link that loses 1 % of the packets, as test data for the producer, until stopped.

Uses the lab of the demo: two network namespaces inside this container, separate from the host's network.
"""

import signal
import threading

from producer.demo.lab import Lab

_ROUND_S = 60.0

stop = threading.Event()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.set())
with Lab(loss=0.01) as lab:
    while not stop.is_set():
        sent = lab.traffic(_ROUND_S, stop)
        print(f"{sent.connections} connections, {sent.payload_bytes} bytes", flush=True)
