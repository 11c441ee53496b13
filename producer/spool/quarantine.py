"""The quarantine: messages that Kafka has rejected, and records that cannot be encoded, on disk for inspection."""

import json
import logging
import os

from producer.config.load import Config
from producer.events import STREAMS, EncodedBatch, Rows, Stream
from producer.host.log_limit import LogLimit
from producer.spool.from_config import new_quarantine

logger = logging.getLogger(__name__)

_RAW_BYTES = 1 << 20
_REPEAT_LOG_S = 30.0


class Quarantine:
    """Stores messages that Kafka has rejected, with the reason, in files like a spool's.

    Records that cannot be encoded go to a separate file with one JSON object per line: `error`, and `record` in
    hexadecimal.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._spools = {
            stream.name: new_quarantine(config, stream, config.spool.quarantine_bytes)
            for stream in STREAMS
            if config.kafka.brokers and config.spool.quarantine_bytes
        }
        self._open: set[str] = set()
        self._log_limit = LogLimit(_REPEAT_LOG_S)
        self._not_stored = 0
        """Messages that were not stored since the last log line."""

    def put(self, batch: EncodedBatch, error: str) -> None:
        """Store messages, up to the size limit."""
        spool = self._spools.get(batch.stream.name)
        if spool is None:
            return
        try:
            if batch.stream.name not in self._open:
                spool.open()
                self._open.add(batch.stream.name)
            spool.append(batch, "", 0, error)
        except OSError as failure:
            self._not_stored += len(batch)
            if self._log_limit.allows("messages"):
                logger.warning("quarantine: cannot store %d messages: %s", self._not_stored, failure.strerror)
                self._not_stored = 0

    def put_raw(self, stream: Stream, rows: Rows, error: str) -> None:
        """Store records that cannot be encoded, up to the size limit."""
        logger.warning("encode: %d events lost topic=%s error=%s", len(rows), stream.topic, error)
        if stream.name not in self._spools:
            return
        path = self._config.state_dir / "quarantine" / f"{stream.name}.raw.jsonl"
        lines = "".join(json.dumps({"error": error, "record": row.tobytes().hex()}) + "\n" for row in rows)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(path, flags | os.O_NONBLOCK, 0o600)  # a pipe without a reader would block
            with open(file, "a") as opened:
                if opened.tell() + len(lines) <= _RAW_BYTES:
                    opened.write(lines)
        except OSError as failure:
            logger.warning("quarantine: cannot store %d records: %s", len(rows), failure.strerror)

    def close(self) -> None:
        """Sync the files to disk and close them."""
        for name in self._open:
            self._spools[name].close()
