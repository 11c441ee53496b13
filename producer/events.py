"""The events: record layouts in the rings, names of values, and the streams.

The dtypes repeat bpf/events.h. `layout_check` turns them into assertions that the compiler checks at each load.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NewType

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.void]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Topic = NewType("Topic", str)
SchemaId = NewType("SchemaId", int)

HOOKS = ("fentry", "kprobe", "raw_tp", "cgroup_skb")
CAUSES = ("other", "rto", "fast", "slow_start", "tlp", "syn", "syn_ack")
ROLES = ("unknown", "client", "server")
REASONS = ("interval", "close")
# include/net/tcp_states.h; the number is the index.
UNKNOWN = "UNKNOWN"
STATES = (
    UNKNOWN,
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "NEW_SYN_RECV",
    "BOUND_INACTIVE",
)
# enum tcp_ca_state in include/uapi/linux/tcp.h
CA_STATES = ("Open", "Disorder", "CWR", "Recovery", "Loss")

# Bits of `known`, by field. `tcp` covers TCP_FIELDS, `counters` COUNTER_FIELDS, and `process` pid and comm.
KNOWN = {
    "sk_cookie": 1 << 0,
    "cgroup_id": 1 << 1,
    "uid": 1 << 2,
    "ack_seq": 1 << 3,
    "ca_state": 1 << 4,
    "tcp": 1 << 5,
    "ifindex": 1 << 6,
    "is_retransmit": 1 << 7,
    "retransmit_no": 1 << 8,
    "start_ns": 1 << 9,
    "role": 1 << 10,
    "process": 1 << 11,
    "error": 1 << 12,
    "connect_us": 1 << 13,
    "counters": 1 << 14,
    "min_rtt_us": 1 << 15,
    "delivery_rate": 1 << 16,
    "pacing_rate": 1 << 17,
    "cc": 1 << 18,
}
TCP_FIELDS = (
    "srtt_us",
    "mdev_us",
    "rto_us",
    "snd_cwnd",
    "snd_ssthresh",
    "packets_out",
    "sacked_out",
    "lost_out",
    "retrans_out",
    "total_retrans",
    "snd_wnd",
    "rcv_wnd",
    "mss",
)
COUNTERS_64 = (
    "bytes_sent",
    "bytes_retrans",
    "bytes_acked",
    "bytes_received",
    "busy_time_us",
    "rwnd_limited_us",
    "sndbuf_limited_us",
)
COUNTERS_32 = (
    "data_segs_out",
    "segs_in",
    "data_segs_in",
    "total_retrans",
    "retrans_rto",
    "retrans_fast",
    "retrans_slow_start",
    "retrans_tlp",
    "retrans_syn",
    "retrans_syn_ack",
    "retrans_other",
    "delivered",
    "delivered_ce",
    "dsack_dups",
    "reord_seen",
    "rcv_ooopack",
)
COUNTER_FIELDS = ("segs_out", *COUNTERS_64, *COUNTERS_32)
"""Of a connection, since it began."""

FLOW = np.dtype(
    [
        ("saddr", "u1", 16),
        ("daddr", "u1", 16),
        ("sk_cookie", "<u8"),
        ("cgroup_id", "<u8"),
        ("netns", "<u4"),
        ("uid", "<u4"),
        ("sport", "<u2"),
        ("dport", "<u2"),
        ("hook", "u1"),
        ("flow_known", "u1"),
        ("_pad0", "u1", 2),
    ]
)
SEGMENT = np.dtype(
    [
        ("flow", FLOW),
        ("ts", "<u8"),
        ("cpu_seq", "<u8"),
        ("cpu", "<u4"),
        ("known", "<u4"),
        ("seq", "<u4"),
        ("end_seq", "<u4"),
        ("ack_seq", "<u4"),
        ("payload_len", "<u4"),
        ("segs", "<u4"),
        ("ifindex", "<u4"),
        ("sample_rate", "<u4"),
        ("tcp_flags", "u1"),
        ("state", "u1"),
        ("ca_state", "u1"),
        ("_pad1", "u1"),
        *((name, "<u4") for name in TCP_FIELDS),
        ("rules_version", "<u4"),
        ("pid", "<u4"),
        ("comm", "u1", 16),
        ("_pad2", "<u4"),
    ]
)
TRANSMIT = np.dtype([("s", SEGMENT), ("is_retransmit", "<u4"), ("_pad3", "<u4")])
RETRANSMIT = np.dtype([("s", SEGMENT), ("err", "<i4"), ("retransmit_no", "<u4"), ("cause", "u1"), ("_pad3", "u1", 7)])
FLOW_EVENT = np.dtype(
    [
        ("flow", FLOW),
        ("ts", "<u8"),
        ("cpu_seq", "<u8"),
        ("cpu", "<u4"),
        ("known", "<u4"),
        ("sample_rate", "<u4"),
        ("rules_version", "<u4"),
        ("start_ns", "<u8"),
        ("connect_us", "<u8"),
        ("pid", "<u4"),
        ("error", "<u4"),
        ("comm", "u1", 16),
        ("cc", "u1", 16),
        ("role", "u1"),
        ("reason", "u1"),
        ("state", "u1"),
        ("ca_state", "u1"),
        ("segs_out", "<u4"),
        *((name, "<u8") for name in COUNTERS_64),
        *((name, "<u4") for name in COUNTERS_32),
        ("srtt_us", "<u4"),
        ("mdev_us", "<u4"),
        ("rto_us", "<u4"),
        ("snd_cwnd", "<u4"),
        ("snd_ssthresh", "<u4"),
        ("snd_wnd", "<u4"),
        ("rcv_wnd", "<u4"),
        ("mss", "<u4"),
        ("min_rtt_us", "<u4"),
        ("_pad1", "<u4"),
        ("pacing_rate", "<u8"),
        ("delivery_rate", "<u8"),
    ]
)


@dataclass(frozen=True, slots=True)
class Feed:
    """A kind of message, with its topic and schema."""

    name: str
    topic: Topic
    fixed_schema_id: SchemaId
    """The id in the Confluent frame if no registry is configured."""

    @property
    def schema_file(self) -> str:
        """Name of the schema's file in schemas/."""
        return f"{self.topic}.avsc"


HEARTBEATS = Feed("heartbeat", Topic("rebpf_agent"), SchemaId(3))
ALERTS = Feed("alert", Topic("tcp_alerts"), SchemaId(4))


@dataclass(frozen=True, slots=True)
class Stream(Feed):
    """A kind of event, with its ring and record layout."""

    index: int
    """Index into the kernel's counters map."""
    dtype: np.dtype[np.void] = field(compare=False)

    @property
    def ring(self) -> str:
        """Name of the ring's map."""
        return f"{self.name}_pipe"

    @property
    def struct(self) -> str:
        """Name of the record's struct in bpf/events.h."""
        return f"{self.name}_event"


TRANSMITS = Stream("transmit", Topic("tcp_transmit"), SchemaId(1), 0, TRANSMIT)
RETRANSMITS = Stream("retransmit", Topic("tcp_retransmit"), SchemaId(2), 1, RETRANSMIT)
FLOWS = Stream("flow", Topic("tcp_flow"), SchemaId(5), 2, FLOW_EVENT)
"""A record for each connection, when it closes and on demand."""
STREAMS = (TRANSMITS, RETRANSMITS, FLOWS)


def common(rows: Rows) -> Rows:
    """Return a view of the rows with the members that all streams have, `flow`, `ts` and `cpu_seq` among them."""
    return rows["s"] if "s" in (rows.dtype.names or ()) else rows


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Consecutive events of one ring, in order.

    `rows` has the stream's dtype and may be a view of the ring, valid until a position after it is committed.
    """

    stream: Stream
    rows: Rows


@dataclass(frozen=True, slots=True, eq=False)
class EncodedBatch:
    """The events of a Batch as Kafka messages. Message i is `payload[starts[i]:][:lengths[i]]`; keys are similar.

    `payload` and `keys` are C-contiguous uint8 arrays, immutable once this object exists; starts and lengths are int64,
    in bytes. Both may be one array, bytes between messages are unused, and messages may share keys. They must outlive
    the delivery of the messages, because the sink passes pointers into them.
    """

    stream: Feed
    payload: NDArray[np.uint8]
    starts: Ints
    lengths: Ints
    keys: NDArray[np.uint8]
    key_starts: Ints
    key_lengths: Ints

    @classmethod
    def of(cls, stream: Feed, key: bytes, value: bytes) -> "EncodedBatch":
        """Return a batch of one message."""
        start, sizes = np.zeros(1, np.int64), (np.array([len(value)], np.int64), np.array([len(key)], np.int64))
        return cls(
            stream, np.frombuffer(value, np.uint8), start, sizes[0], np.frombuffer(key, np.uint8), start, sizes[1]
        )

    def __len__(self) -> int:
        return len(self.starts)

    def values(self) -> list[bytes]:
        """Return the messages' values."""
        payload, ends = self.payload.data, (self.starts + self.lengths).tolist()
        return [payload[start:end].tobytes() for start, end in zip(self.starts.tolist(), ends, strict=True)]

    def packed(self) -> bytes:
        """Return the messages concatenated."""
        ends = self.starts + self.lengths
        return b"".join(map(self.payload.data.__getitem__, map(slice, self.starts.tolist(), ends.tolist())))

    def take(self, rows: Ints) -> "EncodedBatch":
        """Return the messages with the indexes `rows`, in that order."""
        keys = self.keys, self.key_starts[rows], self.key_lengths[rows]
        return EncodedBatch(self.stream, self.payload, self.starts[rows], self.lengths[rows], *keys)


@dataclass(slots=True, eq=False)
class Outcome:
    """The results of a stream's messages since the sink was last asked for them."""

    delivered: int = 0
    """Messages acknowledged."""
    lost: Counter[str] = field(default_factory=Counter)
    """Messages lost, by reason."""
    done: list[tuple[EncodedBatch, Counter[str]]] = field(default_factory=list)
    """Batches that have no messages left in flight, and the losses of each."""


def _members(dtype: np.dtype[np.void], base: int = 0, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    assert dtype.fields is not None
    for name, (member, offset, *_) in dtype.fields.items():
        yield prefix + name, base + offset, member.itemsize
        if member.fields is not None:
            yield from _members(member, base + offset, f"{prefix}{name}.")


def layout_check() -> str:
    """Return C that fails to compile if bpf/events.h and this module differ."""
    lines = []
    for stream in STREAMS:
        struct, dtype = stream.struct, stream.dtype
        lines.append(f'_Static_assert(sizeof(struct {struct}) == {dtype.itemsize}, "{struct}: size");')
        for name, offset, size in _members(dtype):
            at = f"__builtin_offsetof(struct {struct}, {name})"
            lines.append(f'_Static_assert({at} == {offset}, "{struct}.{name}: offset");')
            lines.append(f'_Static_assert(sizeof(((struct {struct} *)0)->{name}) == {size}, "{name}: size");')
    numbers = {
        **{f"HOOK_{name.upper()}": i for i, name in enumerate(HOOKS)},
        **{f"CAUSE_{name.upper()}": i for i, name in enumerate(CAUSES)},
        "CAUSES": len(CAUSES),
        **{f"ROLE_{name.upper()}": i for i, name in enumerate(ROLES)},
        **{f"REASON_{name.upper()}": i for i, name in enumerate(REASONS)},
        **{f"KNOWN_{name.upper()}": bit for name, bit in KNOWN.items()},
    }
    lines += [f'_Static_assert({name} == {value}, "{name}");' for name, value in numbers.items()]
    return "\n".join(lines) + "\n"
