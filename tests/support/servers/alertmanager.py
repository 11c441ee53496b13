"""A real Alertmanager, from the Debian package."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from tests.support.servers import debian
from tests.support.servers.process import ServerProcess, free_port


def package() -> Path:
    """Return the root of the package's files; LookupError if it is unavailable or cannot run."""
    if os.geteuid() != 0:
        raise LookupError("not root: only root can put its templates in place")
    return debian.package("prometheus-alertmanager")


class AlertmanagerServer(ServerProcess):
    """An Alertmanager that notifies nobody, with its data in its folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "alertmanager")
        self.url = f"http://127.0.0.1:{free_port()}"

    def command(self) -> Sequence[str]:
        config = self.folder / "alertmanager.yml"
        config.write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
        # It reads templates only from /usr/share: mount them there, for this process only.
        root = package()
        mount = f"mount -t overlay overlay -o lowerdir={root}/usr/share:/usr/share /usr/share"
        return (
            *("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"),
            os.fspath(root / "usr/bin/prometheus-alertmanager"),
            f"--config.file={config}",
            f"--storage.path={self.folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
            "--cluster.listen-address=",
        )

    def is_ready(self) -> bool:
        try:
            with urlopen(f"{self.url}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def alerts(self) -> list[dict[str, Any]]:
        """Return the firing alerts."""
        with urlopen(f"{self.url}/api/v2/alerts", timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)
            return found
