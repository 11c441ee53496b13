"""Print the Flink SQL tables of ReBPF's topics, from their schemas, and those of the two jobs' results.

Without options, it prints tables.sql.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"
SOURCES = ("tcp_transmit", "tcp_retransmit", "tcp_flow")
ID = ("boot_id", "cpu", "cpu_seq")
TYPES = {"int": "INT", "long": "BIGINT", "double": "DOUBLE", "string": "STRING", "boolean": "BOOLEAN"}
LOGICAL = {"timestamp-millis": "TIMESTAMP(3)"}

# Events of a partition are slightly out of order between flows and CPUs, and much only after an outage.
LATENESS = "5"

RETRANSMITS = {
    "window_start": "TIMESTAMP(3)",
    "host": "STRING",
    "daddr": "STRING",
    "segs": "BIGINT",
    "retransmitted_segs": "BIGINT",
    "ratio": "DOUBLE",
    "causes": "MAP<STRING, BIGINT>",
    "srtt_us_p50": "DOUBLE",
    "srtt_us_p95": "DOUBLE",
    "srtt_us_p99": "DOUBLE",
}
# Of the retransmitted segment, and of the flow's last transmit before it (last_).
LAST_TRANSMITS = {
    "boot_id": "STRING",
    "cpu": "INT",
    "cpu_seq": "BIGINT",
    "ts_ns": "BIGINT",
    "host": "STRING",
    "flow": "STRING",
    "cause": "STRING",
    "seq": "BIGINT",
    "segs": "INT",
    "last_ts_ns": "BIGINT",
    "last_seq": "BIGINT",
    "last_end_seq": "BIGINT",
    "last_snd_cwnd": "BIGINT",
    "last_srtt_us": "BIGINT",
    "since_last_us": "BIGINT",
}


def sql_type(avro: Any) -> str:
    """Return the SQL type of a field's Avro type."""
    if isinstance(avro, list):
        (inner,) = (each for each in avro if each != "null")
        return sql_type(inner).removesuffix(" NOT NULL")
    if isinstance(avro, dict) and avro["type"] == "map":
        return f"MAP<{TYPES['string']} NOT NULL, {sql_type(avro['values'])}> NOT NULL"
    name = LOGICAL[avro["logicalType"]] if isinstance(avro, dict) else TYPES[avro]
    return f"{name} NOT NULL"


def quoted(text: str) -> str:
    """Return a text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def endpoint(address: str, port: str) -> str:
    """Return an SQL expression for address:port, an IPv6 address in brackets."""
    bracketed = f"IF(POSITION(':' IN `{address}`) > 0, '[' || `{address}` || ']', `{address}`)"
    return f"{bracketed} || ':' || CAST(`{port}` AS STRING)"


def create(name: str, columns: Sequence[str], options: dict[str, str]) -> str:
    """Return one CREATE TABLE."""
    lines = ",\n".join(f"  {column}" for column in columns)
    settings = ",\n".join(f"  {quoted(key)} = {quoted(value)}" for key, value in options.items())
    return f"CREATE TABLE {name} (\n{lines}\n) WITH (\n{settings}\n);\n"


def source(topic: str, kafka: dict[str, str], prefix: str, registry: str) -> str:
    """Return the table of one of the producer's topics."""
    schema = json.loads((SCHEMAS / f"{topic}.avsc").read_text())
    columns = [
        *(f"`{each['name']}` {sql_type(each['type'])} COMMENT {quoted(each['doc'])}" for each in schema["fields"]),
        f"`flow` AS {endpoint('saddr', 'sport')} || '>' || {endpoint('daddr', 'dport')}",
        "`arrived` AS PROCTIME()",
        f"WATERMARK FOR `ts` AS `ts` - INTERVAL '{LATENESS}' SECOND",
    ]
    options = {
        "connector": "kafka",
        "topic": prefix + topic,
        **kafka,
        "scan.startup.mode": "earliest-offset",
        "value.format": "avro-confluent",
        "value.avro-confluent.url": registry,
    }
    return create(topic, columns, options)


def result(name: str, columns: dict[str, str], key: Sequence[str], kafka: dict[str, str], prefix: str) -> str:
    """Return the table of a job's result: the last row of each key counts."""
    lines = [f"`{column}` {kind}{' NOT NULL' if column in key else ''}" for column, kind in columns.items()]
    lines.append(f"PRIMARY KEY ({', '.join(f'`{column}`' for column in key)}) NOT ENFORCED")
    options = {
        "connector": "upsert-kafka",
        "topic": prefix + name,
        **kafka,
        "key.format": "json",
        "value.format": "json",
    }
    return create(name, lines, options)


def tables(brokers: str, registry: str, prefix: str = "", properties: Sequence[str] = ()) -> str:
    """Return all tables; `properties` are additional settings of the Kafka clients, each KEY=VALUE."""
    kafka = {"properties.bootstrap.servers": brokers}
    kafka.update({f"properties.{key}": value for key, _, value in (each.partition("=") for each in properties)})
    parts = [
        "-- Made by deploy/flink/ddl.py from schemas/: do not edit.\n",
        *(source(topic, kafka, prefix, registry) for topic in SOURCES),
        result("tcp_retransmit_minute", RETRANSMITS, ("window_start", "host", "daddr"), kafka, prefix),
        result("tcp_retransmit_last", LAST_TRANSMITS, ID, kafka, prefix),
    ]
    return "\n".join(parts)


def _property(text: str) -> str:
    if not re.match(r"[^=]+=", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return text


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brokers", default="localhost:9092")
    parser.add_argument("--registry", default="http://localhost:8081", metavar="URL")
    parser.add_argument("--prefix", default="", help="the producer's kafka.topic_prefix, also used for the results")
    parser.add_argument("--property", action="append", default=[], type=_property, metavar="KEY=VALUE")
    given = parser.parse_args()
    sys.stdout.write(tables(given.brokers, given.registry, given.prefix, given.property))


if __name__ == "__main__":
    main()
