"""A real schema registry on 127.0.0.1: Apicurio 3.0, with its Confluent-compatible API."""

import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from . import fetch
from .process import ServerProcess, free_port


class SchemaRegistry(ServerProcess):
    """A registry with its database in `folder`: schemas and ids survive a restart.

    The port is chosen at the first start and kept.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "registry")
        self._port = 0

    @property
    def url(self) -> str:
        """Base of the Confluent-compatible API."""
        if not self._port:
            raise RuntimeError("registry has no address before its first start")
        return f"http://127.0.0.1:{self._port}/apis/ccompat/v7"

    def command(self) -> Sequence[str]:
        self._port = self._port or free_port()
        # Without write delay, an answered request is on disk; by default H2 writes half a second later.
        database = f"jdbc:h2:file:{self.folder / 'data'};WRITE_DELAY=0"
        settings = {
            "quarkus.http.host": "127.0.0.1",
            "quarkus.http.port": str(self._port),
            "apicurio.datasource.url": database,
        }
        options = ["-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        jar = fetch.registry() / "apicurio-registry-app-3.0.9-runner.jar"
        return ["java", *options, *(f"-D{key}={value}" for key, value in settings.items()), "-jar", str(jar)]

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/subjects", timeout=1) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False
