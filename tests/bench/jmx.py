"""A broker's own counters, read by JMX with Kafka's JmxTool."""

import subprocess
from collections import Counter
from collections.abc import Sequence

from tests.support.servers import fetch
from tests.support.servers.process import free_port

_LOCAL = ("authenticate=false", "ssl=false", "host=127.0.0.1")


class Jmx:
    """The counters of a running broker. Each reading starts a JVM, which takes about a second of CPU."""

    def __init__(self, pid: int) -> None:
        self._port = free_port()
        start = ["jcmd", str(pid), "ManagementAgent.start", f"jmxremote.port={self._port}"]
        subprocess.run([*start, *(f"jmxremote.{each}" for each in _LOCAL)], check=True, capture_output=True)

    def read(self, names: Sequence[str], attributes: Sequence[str] = ("Count",)) -> dict[str, float]:
        """Return attributes of the objects that match `names`, by `NAME:ATTRIBUTE`."""
        url = f"service:jmx:rmi:///jndi/rmi://127.0.0.1:{self._port}/jmxrmi"
        tool = ["java", "-XX:TieredStopAtLevel=1", "-cp", f"{fetch.kafka()}/*", "org.apache.kafka.tools.JmxTool"]
        options = ["--jmx-url", url, "--one-time", "--report-format", "properties"]
        chosen = [option for name in names for option in ("--object-name", name)]
        command = [*tool, *options, "--attributes", ",".join(attributes), *chosen]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "No matched attributes" not in done.stderr:  # none yet
            raise RuntimeError(f"JmxTool: {done.stderr}")
        pairs = (line.rpartition("=") for line in done.stdout.splitlines() if line.startswith("kafka."))
        return {name: float(value) for name, _, value in pairs}

    def requests(self, kind: str = "*") -> Counter[str]:
        """Return the requests served since the broker's start, by kind; those of other brokers are among them."""
        found: Counter[str] = Counter()
        names = [f"kafka.network:type=RequestMetrics,name=RequestsPerSec,request={kind},*"]
        for name, count in self.read(names).items():
            found[name.partition("request=")[2].partition(",")[0]] += int(count)
        return found
