"""Flink SQL on a real mini cluster: deploy/flink/run.py in a venv of its own, for PyFlink has its own pins."""

import subprocess
from pathlib import Path

from . import fetch

RUN = Path(__file__).resolve().parents[2] / "deploy" / "flink" / "run.py"
DEADLINE_S = 150.0
TAIL_LINES = 60
SETTINGS = {
    "parallelism.default": "1",
    "env.java.opts.all": "-Xmx768m -XX:+UseSerialGC",
    "taskmanager.memory.managed.size": "128m",
    "rest.bind-address": "127.0.0.1",
}


def run_sql(folder: Path, *files: Path) -> None:
    """Run files of SQL in one session until their jobs have ended."""
    flink = fetch.flink()
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    python = flink / "venv" / "bin" / "python"
    command = ["setpriv", "--pdeathsig", "KILL", python, RUN, "--jars", flink / "jars", *settings, *files]
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-TAIL_LINES:])
        raise RuntimeError(f"{RUN.name} ended with {done.returncode}:\n{tail}")
