"""Flink SQL on a real mini cluster: deploy/flink/run.py in a separate venv, since PyFlink pins its dependencies."""

import os
import subprocess
import sys
from pathlib import Path

from . import fetch

FLINK = Path(__file__).resolve().parents[3] / "deploy" / "flink"
RUN = FLINK / "run.py"
SOURCES = ("tcp_transmit", "tcp_retransmit", "tcp_flow")
DEADLINE_S = 600.0
TAIL_LINES = 60
JVM = "-Xmx768m -XX:+UseSerialGC"


def tables(folder: Path, brokers: str, registry: str, prefix: str) -> Path:
    """Return a file of the tables, with sources bounded at the topics' current ends, so that jobs end."""
    options = ["--brokers", brokers, "--registry", registry, "--prefix", prefix]
    made = subprocess.run([sys.executable, FLINK / "ddl.py", *options], capture_output=True, text=True, check=True)
    ends = [f"ALTER TABLE {each} SET ('scan.bounded.mode' = 'latest-offset');" for each in SOURCES]
    file = folder / "tables.sql"
    file.write_text("\n".join([made.stdout, *ends]))
    return file


def run_sql(folder: Path, *files: Path) -> None:
    """Run SQL files in one session until their jobs have ended; Flink's log is in `folder`."""
    flink = fetch.flink()
    python = flink / "venv" / "bin" / "python"
    # Flink ends with the process that opened the session, because it reads from its pipe.
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        python,
        RUN,
        "--jars",
        flink / "jars",
        "--set=parallelism.default=2",
        *files,
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "JVM_ARGS": JVM, "FLINK_LOG_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-TAIL_LINES:])
        raise RuntimeError(f"{RUN.name} ended with {done.returncode}:\n{tail}")
