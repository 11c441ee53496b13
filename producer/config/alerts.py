"""The settings of `rebpf alert`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

GROUPS: Mapping[str, tuple[str, ...]] = {
    "host": ("host",),
    "peer": ("daddr",),
    "subnet": ("subnet",),
    "port": ("port",),
    "unit": ("unit",),
    "container": ("container",),
    "host+peer": ("host", "daddr"),
    "flow": ("host", "saddr", "sport", "daddr", "dport"),
}
"""What a rule can group by, and the columns that a group's name consists of."""
MEASURES = ("ratio", "data_ratio", "count", "failed_connects", "srtt")
SILENT = "silent"
"""Name of the built-in rule for hosts whose heartbeats have stopped."""


@dataclass(frozen=True, slots=True)
class AlertRule:
    """[[alert.rules]]: a threshold on a measure of each group, per window of event time."""

    name: str = ""
    """Name of the rule in the alerts."""
    by: str = "host"
    """Group by host, peer (remote address), subnet (of the peer), port (the lower one), unit, container, host+peer or
    flow."""
    prefix: int = 24
    """Length of an IPv4 subnet's prefix, with by = "subnet"."""
    prefix_v6: int = 64
    """Length of an IPv6 subnet's prefix, with by = "subnet"."""
    measure: str = "ratio"
    """ratio: retransmitted segments divided by all segments sent; data_ratio: without SYNs and acknowledgements; count:
    retransmitted segments; failed_connects: connects that failed; srtt: smoothed round-trip time in seconds."""
    quantile: float = 0.95
    """Quantile of the round-trip times that is compared, with measure = "srtt"."""
    window_s: float = 60.0
    """Length of a window in seconds."""
    for_s: float = 0.0
    """Fire only if the threshold was reached in all windows of this many seconds before, too."""
    threshold: float = 0.05
    """Fire at this value or above."""
    clear: float = 0.02
    """Resolve below this value; between the two values, nothing changes."""
    minimum: int = 1
    """Do not fire in windows with fewer segments (ratio, data_ratio: sent; count: retransmitted), failed connects, or
    measured round-trip times."""
    host: tuple[str, ...] = ()
    """Only hosts that match one of these patterns, such as "web-*"."""
    peer: tuple[str, ...] = ()
    """Only peers in one of these networks, such as "10.0.0.0/8"."""
    port: tuple[int | str, ...] = ()
    """Only these local or remote ports, or ranges such as "8000-8999"."""
    unit: tuple[str, ...] = ()
    """Only systemd units that match one of these patterns."""
    cause: tuple[str, ...] = ()
    """Count only retransmissions of these causes (rto, fast, slow_start, tlp, syn, syn_ack, other), or connects that
    failed with these errors (ECONNREFUSED, ETIMEDOUT, ...; closed: given up by the process)."""
    only_labels: Mapping[str, str] = field(default_factory=dict)
    """Only hosts with all of these site labels."""
    severity: str = "warning"
    """Severity of the alerts, also a label in Alertmanager."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels added to the alerts."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Annotations added to the alerts."""


@dataclass(frozen=True, slots=True)
class Alert:
    """[alert]: the alerting consumer, `rebpf alert`."""

    group: str = "rebpf-alert"
    """Consumer group; one of its members is active, the others are standbys."""
    listen: str = "127.0.0.1:9466"
    """HOST:PORT of the endpoint for metrics and health; empty: no endpoint; port 0: any free port."""
    lateness_s: float = 10.0
    """Seconds to wait for late records after the end of a window."""
    wait_s: float = 60.0
    """Seconds that windows wait for a partition that lags behind the others."""
    lookback_s: float = 60.0
    """At a start, read this many seconds before the undecided windows to know each connection's counters: at least
    twice capture.flow_interval_s of the producers."""
    missed_heartbeats: float = 3.0
    """Number of missed heartbeats after which a host is silent; 0: no alerts on silence."""
    stdout: bool = False
    """Write alerts to standard output."""
    alertmanager: str | None = None
    """URL of an Alertmanager to send alerts to."""
    webhook: str | None = None
    """URL to send alerts to, as a JSON list."""
    repeat_s: float = 60.0
    """Seconds between two notifications to Alertmanager of an alert that is still firing."""
    rules: tuple[AlertRule, ...] = ()
