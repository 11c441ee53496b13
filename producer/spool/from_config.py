"""A stream's spool, quarantine and ledger, with the paths and sizes of the configuration."""

from pathlib import Path

from producer.config.load import Config
from producer.events import Stream
from producer.host.clock import now
from producer.schemas import load_schema
from producer.spool.spool import Spool


def spool_folder(config: Config, stream: Stream) -> Path:
    """Return the folder of a stream's spool."""
    return config.state_dir / "spool" / stream.name


def quarantine_folder(config: Config, stream: Stream) -> Path:
    """Return the folder of a stream's messages that Kafka has rejected."""
    return config.state_dir / "quarantine" / stream.name


def ledger_path(config: Config, stream: Stream) -> Path:
    """Return the file of a stream's ledger."""
    return config.state_dir / f"ledger.{stream.name}"


def spool_bytes(config: Config, stream: Stream) -> int:
    """Return the size limit of a stream's spool. With the test broker, which stores nothing, it is 0."""
    return int(getattr(config.spool, f"{stream.name}_bytes")) if config.kafka.brokers else 0


def new_spool(config: Config, stream: Stream) -> Spool:
    """Return a stream's spool, not yet opened."""
    return Spool(
        spool_folder(config, stream),
        stream,
        load_schema(stream.schema_file),
        now,
        max_bytes=spool_bytes(config, stream),
        max_age_s=config.spool.max_age_s,
        when_full=config.spool.when_full,
    )


def new_quarantine(config: Config, stream: Stream, max_bytes: int) -> Spool:
    """Return a stream's quarantine, not yet opened."""
    schema = load_schema(stream.schema_file)
    return Spool(quarantine_folder(config, stream), stream, schema, now, max_bytes=max_bytes)
