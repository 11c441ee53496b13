"""Writes the rules as a Flink SQL job, for fleets that one process cannot follow.

The job computes what `windows` and `evaluate` do, on the same input: differences of counters by LAG, windows by HOP of
two widths, so that a window without records still has a row after one with records, and hysteresis by the last decisive
window. Silent hosts, and the causes, hosts and flows of an alert, are left to `rebpf alert`.
"""

import fnmatch
import ipaddress
import math
from collections.abc import Iterator

from producer.alert.connections import CAUSE_COUNTERS, COUNTERS
from producer.alert.engine import EVENT_FIELDS, FLOW_FIELDS, stream_of
from producer.alert.evaluate import RATIOS, windows_before
from producer.alert.measure import FIELDS, causes_of
from producer.config.load import AlertRule, Config
from producer.connections import GIVEN_UP
from producer.consume.plan import Fields
from producer.errors import ConfigError
from producer.events import FLOWS, RETRANSMITS, Stream
from producer.topics import topic

SINK = "tcp_alerts_flink"
_FIELDS = {FLOWS: FLOW_FIELDS, RETRANSMITS: EVENT_FIELDS}
_TYPES = {
    "long": "BIGINT NOT NULL", "long?": "BIGINT", "string": "STRING NOT NULL", "string?": "STRING",
    "map?": "MAP<STRING NOT NULL, STRING NOT NULL> NOT NULL",
}  # fmt: skip
_VIEWS = {FLOWS: "flow_counts", RETRANSMITS: "retransmit_events"}
_RESULT = (
    "`rule` STRING, `by` STRING, `group` STRING, `firing` BOOLEAN, `measure` STRING, `value` DOUBLE, "
    "`threshold` DOUBLE, `clear` DOUBLE, `window_start` TIMESTAMP(3), `window_s` DOUBLE, `segs` BIGINT, "
    "`severity` STRING"
)


def job(config: Config, since_ns: int) -> str:
    """Return the SQL of a job that reads all records since `since_ns`; ConfigError for what SQL cannot express."""
    rules = config.alert.rules
    if not rules or config.kafka.brokers is None or config.registry.url is None:
        raise ConfigError("alert: the Flink job needs rules, brokers and a registry")
    streams = [stream for stream in (FLOWS, RETRANSMITS) if any(stream_of(rule) is stream for rule in rules)]
    labeled = any(rule.only_labels for rule in rules)
    return "\n\n".join(
        [
            "-- Made by `rebpf alert --flink-sql`. For TLS and SASL, add the Java client's settings: properties.*.",
            "SET 'pipeline.name' = 'rebpf alerts';\nSET 'table.local-time-zone' = 'UTC';",
            # An idle partition would hold back the others' windows.
            f"SET 'table.exec.source.idle-timeout' = '{round(config.alert.wait_s * 1000)} ms';",
            f"SET 'table.exec.state.ttl' = '{max(1, *(_days(rule) for rule in rules))} d';",
            *(_source(config, stream, since_ns, labeled=labeled) for stream in streams),
            _table(SINK, _RESULT, {**_kafka(config, config.kafka.topic_prefix + SINK), "format": "json"}),
            *(_view(stream, since_ns, labeled=labeled) for stream in streams),
            f"EXECUTE STATEMENT SET BEGIN\n{''.join(map(_insert, rules))}END;\n",
        ]
    )


def _days(rule: AlertRule) -> int:
    """Return how long a group's state is needed: it changes once in a window."""
    return math.ceil(2 * (windows_before(rule) + 1) * rule.window_s / 86400)


def _kafka(config: Config, name: str) -> dict[str, str]:
    return {"connector": "kafka", "topic": name, "properties.bootstrap.servers": config.kafka.brokers or ""}


def _table(name: str, columns: str, options: dict[str, str]) -> str:
    settings = ",\n".join(f"  {_quoted(key)} = {_quoted(value)}" for key, value in options.items())
    return f"CREATE TEMPORARY TABLE {name} (\n  {columns}\n) WITH (\n{settings}\n);"


def _source(config: Config, stream: Stream, since_ns: int, *, labeled: bool) -> str:
    columns = {"ts": "TIMESTAMP(3) NOT NULL", **_types(_FIELDS[stream], labeled=labeled)}
    lines = [f"`{name}` {kind}" for name, kind in columns.items()]
    lines += ["`arrived` AS PROCTIME()"]
    lines += [f"WATERMARK FOR `ts` AS `ts` - INTERVAL {_interval(config.alert.lateness_s)}"]
    start = {"scan.startup.mode": "timestamp", "scan.startup.timestamp-millis": str(since_ns // 1_000_000)}
    options = {
        **_kafka(config, str(topic(config, stream))),
        **(start if since_ns else {"scan.startup.mode": "earliest-offset"}),
        "value.format": "avro-confluent",
        "value.avro-confluent.url": config.registry.url or "",
    }
    return _table(f"alert_{stream.topic}", ",\n  ".join(lines), options)


def _types(fields: Fields, *, labeled: bool) -> dict[str, str]:
    """Return the SQL types of fields, without the labels if no rule needs them: older records have none."""
    return {name: _TYPES[kind] for name, kind in fields if labeled or name != "labels"}


def _view(stream: Stream, since_ns: int, *, labeled: bool) -> str:
    names = ", ".join(f"`{name}`" for name in ("ts", *_types(FIELDS, labeled=labeled)))
    if stream is RETRANSMITS:
        return (
            f"CREATE TEMPORARY VIEW {_VIEWS[stream]} AS\nSELECT {names}, segs, cause FROM (\n"
            "  SELECT *,\n"
            "    ROW_NUMBER() OVER (PARTITION BY host, boot_id, cpu, cpu_seq ORDER BY arrived ASC) AS copy_number\n"
            f"  FROM alert_{stream.topic}\n)\nWHERE copy_number = 1;"
        )
    # In the order of arrival, which is that of each connection. A record that is not later than one before is a copy.
    over = "WINDOW w AS (PARTITION BY host, boot_id, netns, socket ORDER BY arrived)"
    source = f"(SELECT *, COALESCE(CAST(sk_cookie AS STRING), {_FLOW}) AS socket FROM alert_{stream.topic})"
    before = ", ".join(f"LAG({name}) OVER w AS {name}_before" for name in ("ts_ns", "reason", *COUNTERS))
    counted = [name for name in COUNTERS if name != "retrans_other"]
    causes = [name for name in CAUSE_COUNTERS if name in counted]
    counters = ",\n  ".join(f"{_counter(name, since_ns)} * sample_rate AS {name}" for name in counted)
    return (
        f"CREATE TEMPORARY VIEW {_VIEWS[stream]} AS\n"
        # What no cause has of the retransmissions is of the cause `other`. SYN-ACKs are sent before there is a socket.
        f"SELECT *, GREATEST(0, total_retrans - {' - '.join(causes)}) AS retrans_other,\n"
        "  segs_out + retrans_syn_ack + first_syn_ack AS segs FROM (\n"
        f"SELECT {names}, srtt_us,\n"
        "  CASE WHEN reason = 'close' AND state = 'SYN_SENT' AND (reason_before IS DISTINCT FROM 'close' OR again)\n"
        f"    THEN COALESCE(error, '{GIVEN_UP}') END AS failed,\n"
        f"  CASE WHEN role = 'server' AND (again OR segs_out_before IS NULL AND start_ns > {since_ns})\n"
        f"    THEN sample_rate ELSE 0 END AS first_syn_ack,\n  {counters}\n"
        f"FROM (\n  SELECT *, {_AGAIN} AS again FROM (\n  SELECT *, {before} FROM (\n"
        "  SELECT *, LAG(last_ns) OVER w AS last_ns_before\n"
        f"  FROM (SELECT *, MAX(ts_ns) OVER w AS last_ns FROM {source} {over})\n  {over}\n)\n"
        f"WHERE last_ns_before IS NULL OR ts_ns > last_ns_before\n{over}\n)\n)\n);"
    )


def _growth(name: str) -> str:
    """Return a counter's difference to the record before: it has 32 bits, and may wrap."""
    return f"MOD({name} - {name}_before + 4294967296, 4294967296)"


def _fell(name: str) -> str:
    return f"{_growth(name)} >= 2147483648"


_AGAIN = (
    "(start_ns > ts_ns_before OR start_ns IS NULL AND reason_before = 'close')\n    AND "
    f"(start_ns IS NOT NULL AND reason_before = 'close' OR {' OR '.join(map(_fell, COUNTERS))})"
)
"""Whether a record is of another connection of the same socket, as in native/connections.c."""


def _counter(name: str, since_ns: int) -> str:
    """Return what a record adds. The causes of retransmissions start at 0 when the producer restarts."""
    fallen = name if name in CAUSE_COUNTERS else "0"
    first = f"WHEN {name}_before IS NULL THEN IF(start_ns > {since_ns}, {name}, 0)"
    return f"CASE WHEN again THEN {name} {first} WHEN {_fell(name)} THEN {fallen} ELSE {_growth(name)} END"


def _insert(rule: AlertRule) -> str:
    before = windows_before(rule)
    width = _interval(rule.window_s)
    total, part, value, size = _measure(rule)
    over = "OVER (PARTITION BY grp ORDER BY window_time"
    conditions = " AND ".join(_conditions(rule)) or "TRUE"
    return f"""
INSERT INTO {SINK}
WITH records AS (
  SELECT *, {_group(rule)} AS grp, ts >= window_end - INTERVAL {width} AS is_current
  FROM TABLE(
    HOP(TABLE {_VIEWS[stream_of(rule)]}, DESCRIPTOR(ts), INTERVAL {width}, INTERVAL {_interval(2 * rule.window_s)})
  )
  WHERE {conditions}
),
sums AS (
  SELECT window_end, window_time, grp, {total} AS total, {part} AS part
  FROM records GROUP BY window_start, window_end, window_time, grp
),
measured AS (
  SELECT *, {value} AS measure_value FROM sums
),
runs AS (
  SELECT *, SUM(CASE WHEN measure_value >= {rule.threshold!r} AND {size} >= {rule.minimum} THEN 1 ELSE 0 END)
    {over} RANGE BETWEEN INTERVAL {_interval(before * rule.window_s)} PRECEDING AND CURRENT ROW) AS run
  FROM measured
),
decisions AS (
  SELECT *, CASE WHEN run = {before + 1} THEN 1 WHEN measure_value < {rule.clear!r} THEN 0 END AS decision FROM runs
),
states AS (
  SELECT *, COALESCE(LAST_VALUE(decision) {over}), 0) AS state FROM decisions
),
changes AS (
  SELECT *, COALESCE(LAG(state) {over}), 0) AS state_before FROM states
)
SELECT {_quoted(rule.name)}, {_quoted(rule.by)}, grp, state = 1, {_quoted(rule.measure)}, measure_value,
  CAST({rule.threshold!r} AS DOUBLE), CAST({rule.clear!r} AS DOUBLE), window_end - INTERVAL {width},
  CAST({rule.window_s!r} AS DOUBLE), {"CAST(0 AS BIGINT)" if rule.measure == "count" else "total"},
  {_quoted(rule.severity)}
FROM changes WHERE state <> state_before;
"""


def _measure(rule: AlertRule) -> tuple[str, str, str, str]:
    """Return the expressions for a window's total and part, the rule's value, and what is compared with its minimum."""

    def current(expression: str) -> str:
        return f"COALESCE(SUM(CASE WHEN is_current THEN {expression} ELSE 0 END), 0)"

    if rule.measure == "srtt":
        chosen = "CASE WHEN is_current AND srtt_us > 0 THEN srtt_us END"
        return f"COUNT({chosen})", f"PERCENTILE({chosen}, {rule.quantile!r})", "COALESCE(part, 0) / 1e6", "total"
    if rule.measure in RATIOS:
        is_data = rule.measure == "data_ratio"
        part = current(" + ".join(f"COALESCE(retrans_{cause}, 0)" for cause in causes_of(rule)) or "0")
        value = "LEAST(1.0, CAST(part AS DOUBLE) / GREATEST(total, 1))"
        return current("data_segs_out" if is_data else "segs"), part, value, "total"
    what = "failed" if rule.measure == "failed_connects" else "cause"
    chosen = f"{what} IN ({', '.join(map(_quoted, rule.cause))})" if rule.cause else f"{what} IS NOT NULL"
    weight = "sample_rate" if rule.measure == "failed_connects" else "segs * sample_rate"
    return current(f"IF({chosen}, 1, 0)"), current(f"IF({chosen}, {weight}, 0)"), "CAST(part AS DOUBLE)", "part"


def _group(rule: AlertRule) -> str:
    if rule.by == "subnet":
        raise ConfigError(f"alert.rules: {rule.name}: Flink SQL has no subnets: group by peer, or use `rebpf alert`")
    return {
        "host": "host",
        "peer": "daddr",
        "port": "CAST(IF(sport > 0, LEAST(sport, dport), dport) AS STRING)",
        "unit": "unit",
        "container": "container",
        "host+peer": "host || ' ' || daddr",
        "flow": f"host || ' ' || {_FLOW}",
    }[rule.by]


def _conditions(rule: AlertRule) -> Iterator[str]:
    if rule.by in ("unit", "container"):
        yield f"{rule.by} IS NOT NULL"
    for name, patterns in (("host", rule.host), ("unit", rule.unit)):
        if patterns:
            yield _any(f"REGEXP({name}, {_quoted(_pattern(pattern))})" for pattern in patterns)
    if rule.peer:
        yield _any(_within(rule, text) for text in rule.peer)
    if rule.port:
        ranges = [str(value).partition("-")[::2] for value in rule.port]
        sides = ("sport", "dport")
        yield _any(f"{side} BETWEEN {low} AND {high or low}" for low, high in ranges for side in sides)
    for name, value in rule.only_labels.items():
        yield f"labels[{_quoted(name)}] = {_quoted(value)}"


def _any(conditions: Iterator[str]) -> str:
    return f"({' OR '.join(conditions)})"


def _pattern(glob: str) -> str:
    return "^" + fnmatch.translate(glob).replace(r"\Z", r"\z")


def _within(rule: AlertRule, text: str) -> str:
    network = ipaddress.ip_network(text)
    if network.version == 6:
        raise ConfigError(f"alert.rules: {rule.name}: Flink SQL has no IPv6 networks: use `rebpf alert`")
    parts = [f"CAST(SPLIT_INDEX(daddr, '.', {at}) AS BIGINT) * {256 ** (3 - at)}" for at in range(4)]
    first, last = int(network.network_address), int(network.broadcast_address)
    return f"(POSITION(':' IN daddr) = 0 AND {' + '.join(parts)} BETWEEN {first} AND {last})"


def _endpoint(address: str, port: str) -> str:
    bracketed = f"IF(POSITION(':' IN {address}) > 0, '[' || {address} || ']', {address})"
    return f"{bracketed} || ':' || CAST({port} AS STRING)"


_FLOW = f"{_endpoint('saddr', 'sport')} || '>' || {_endpoint('daddr', 'dport')}"


def _interval(seconds: float) -> str:
    """Return an interval literal, without the word INTERVAL."""
    days, rest = divmod(round(seconds * 1000), 86_400_000)
    hours, rest = divmod(rest, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"'{days} {hours:02}:{minutes:02}:{rest // 1000:02}.{rest % 1000:03}' DAY TO SECOND(3)"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
