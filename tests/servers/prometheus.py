"""A real Prometheus and its promtool: Debian's package, unpacked into the cache and never installed.

Installed, the package would start a server of its own.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from tests.servers.fetch import cached
from tests.servers.process import ServerProcess, free_port

PROGRAMS = ("prometheus", "promtool")


def programs() -> Path:
    """Return the folder of `prometheus` and `promtool`; LookupError where apt has no such package."""
    found = {Path(path).parent for path in map(shutil.which, PROGRAMS) if path}
    return found.pop() if len(found) == 1 else cached("prometheus", _fill)


def _fill(part: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="prometheus-") as name:
        # apt's own user cannot write into the folder.
        command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", "prometheus"]
        if shutil.which("apt-get") is None:
            raise LookupError("there is no apt-get to fetch prometheus with")
        done = subprocess.run(command, cwd=name, capture_output=True, text=True)
        if done.returncode:
            raise LookupError(f"apt-get download prometheus: {done.stderr.strip()}")
        (package,) = Path(name).glob("*.deb")
        subprocess.run(["dpkg", "-x", package, name], check=True)
        for program in PROGRAMS:
            shutil.move(Path(name, "usr/bin", program), part / program)


class Prometheus(ServerProcess):
    """One that reads a config file; its data are in its folder."""

    def __init__(self, folder: Path, config: Path) -> None:
        super().__init__(folder, "prometheus")
        self._config = config
        self._address = f"127.0.0.1:{free_port()}"

    def command(self) -> Sequence[str]:
        return (
            os.fspath(programs() / "prometheus"),
            f"--config.file={self._config}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address={self._address}",
        )

    def is_ready(self) -> bool:
        try:
            with urlopen(f"http://{self._address}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of /api/v1."""
        with urlopen(f"http://{self._address}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, str]]:
        """Return the labels of each series that an expression has now."""
        return [series["metric"] for series in self.get("query", query=expression)["result"]]
