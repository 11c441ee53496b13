"""The baseline: a producer without columns and batches. The same BPF programs and events, but per event a Python
callback (bcc), a fastavro record and a produce().

python -m tests.bench.baseline BROKERS PORT [CODEC]. Prints "ready" to standard error, ends on SIGTERM, and prints a
balance like the producer.
"""

import ctypes
import io
import ipaddress
import json
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
from confluent_kafka import Producer

from producer.events import CA_STATES, CAUSES, HOOKS, KNOWN, STATES, STREAMS, TCP_FIELDS, Stream, Topic
from producer.host.clock import UtcOffset
from producer.kernel.capture import Capture
from producer.kernel.settings import CaptureSettings
from producer.schemas import frame, load_schema
from tests.support.rules import filtered
from tests.support.servers.fetch import cache

sys.path.append("/usr/lib/python3/dist-packages")
from bcc.libbcc import _RINGBUF_CB_TYPE, lib

BITS = {**KNOWN, **dict.fromkeys(TCP_FIELDS, KNOWN["tcp"])}
HOST = {"host": socket.gethostname(), "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
WAIT_MS = 50
# numpy's letter of 8 bytes, L, is of 4 in a struct without alignment.
LETTERS = {"u1": "B", "u2": "H", "u4": "I", "u8": "Q", "i4": "i"}


def flattened(dtype: np.dtype[np.void]) -> tuple[struct.Struct, list[str]]:
    """Return a struct that unpacks a row of the dtype, and the names of its values."""
    assert dtype.fields is not None
    letters, names = "", list[str]()
    for name, (member, *_) in dtype.fields.items():
        if member.fields is not None:
            inner, inner_names = flattened(member)
            letters, names = letters + inner.format[1:], names + inner_names
        else:
            letters += f"{member.itemsize}s" if member.subdtype else LETTERS[member.str[1:]]
            names.append(name)
    return struct.Struct("<" + letters), names


def address(packed: bytes) -> str:
    """Return 16 bytes as text; an IPv4-mapped address as IPv4."""
    ip = ipaddress.IPv6Address(packed)
    return str(ip.ipv4_mapped or ip)


def key(record: dict[str, Any]) -> bytes:
    """Return an event's Kafka key."""
    ends = [(f"[{record[name]}]" if ":" in record[name] else record[name]) for name in ("saddr", "daddr")]
    return f"{ends[0]}:{record['sport']}>{ends[1]}:{record['dport']}".encode()


def to_record(values: dict[str, Any], offset_ns: int) -> dict[str, Any]:
    """Return an event as a dictionary for fastavro."""
    known = values["known"] | values["flow_known"]
    record = {name: value if known & BITS.get(name, -1) else None for name, value in values.items()}
    ts_ns = values["ts"] + offset_ns
    record.update(HOST, ts=ts_ns // 1_000_000, ts_ns=ts_ns, cgroup="/")
    record.update(saddr=address(values["saddr"]), daddr=address(values["daddr"]), hook=HOOKS[values["hook"]])
    record["state"] = STATES[values["state"]]
    if record["ca_state"] is not None:
        record["ca_state"] = CA_STATES[values["ca_state"]]
    if "cause" in record:
        record["cause"] = CAUSES[values["cause"]]
    elif record["is_retransmit"] is not None:
        record["is_retransmit"] = bool(values["is_retransmit"])
    return record


def callback(stream: Stream, producer: Producer, delivered: dict[Topic, int]) -> Callable[[int, int, int], int]:
    """Return the function that moves one event of a stream from its ring to Kafka."""
    layout, names = flattened(stream.dtype)
    schema, header = fastavro.parse_schema(load_schema(stream.schema_file)), frame(stream.fixed_schema_id)

    def count(error: Any, message: Any) -> None:
        if error is None:
            delivered[stream.topic] += 1

    utc_offset = UtcOffset()

    def on_event(context: int, data: int, size: int) -> int:
        row = (ctypes.c_char * size).from_address(data)
        record = to_record(dict(zip(names, layout.unpack_from(row), strict=True)), utc_offset())
        out = io.BytesIO(header)
        out.seek(len(header))
        fastavro.schemaless_writer(out, schema, record)
        while True:
            try:
                producer.produce(stream.topic, out.getvalue(), key(record), on_delivery=count)
                return 0
            except BufferError:
                producer.poll(0.1)

    return on_event


def main(brokers: str, port: int, codec: str = "") -> None:
    """Run until SIGTERM."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    settings = {"bootstrap.servers": brokers, "compression.codec": codec or "lz4", "linger.ms": 20}
    producer = Producer({**settings, "enable.idempotence": True, "acks": "all"})
    delivered = {stream.topic: 0 for stream in STREAMS}
    with Capture(CaptureSettings(rules=filtered(ports=(port,)), cache=cache() / "bench" / "programs")) as hooks:
        hooks.load()
        callbacks = [_RINGBUF_CB_TYPE(callback(stream, producer, delivered)) for stream in STREAMS]
        manager = None
        for stream, each in zip(STREAMS, callbacks, strict=True):
            descriptor = hooks._maps[stream.ring]
            if manager is None:
                manager = lib.bpf_new_ringbuf(descriptor, each, None)
            else:
                lib.bpf_add_ringbuf(manager, descriptor, each, None)
        hooks.attach()
        print("ready", file=sys.stderr, flush=True)
        while not stopped:
            lib.bpf_consume_ringbuf(manager)
            producer.poll(WAIT_MS / 1000)
        lib.bpf_consume_ringbuf(manager)
        producer.flush(30)
        passed = {stream.topic: hooks.counters(stream).passed for stream in STREAMS}
    print(json.dumps({topic: {"passed": passed[topic], "delivered": delivered[topic]} for topic in delivered}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
