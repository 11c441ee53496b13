"""Download the test servers once; `python -m tests.support.servers.fetch` does it ahead of the tests.

Each is a folder of the cache, filled under another name and renamed when complete, so an existing folder is complete.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# 2.8 unpacks the registry without its parent POM, which is not on Maven Central; later versions insist on it.
PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:2.8"
REGISTRY_ARTIFACT = "io.apicurio:apicurio-registry-app:3.0.9:tar.gz:all"
KAFKA = "kafka-4.2.0"
REGISTRY = "apicurio-registry-3.0.9"
FLINK = "flink-2.1.1"
FLINK_PACKAGE = "apache-flink==2.1.1"
FLINK_PYTHON = (3, 12)  # the newest with wheels for its pinned dependencies
FLINK_CONNECTORS = (
    "org.apache.flink:flink-sql-connector-kafka:4.0.1-2.0",
    "org.apache.flink:flink-sql-avro-confluent-registry:2.1.0",
)
DEADLINE_S = 1200

AVRO = "avro-1.12.0"
AVRO_POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>rebpf</groupId> <artifactId>avro</artifactId> <version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.avro</groupId> <artifactId>avro</artifactId> <version>1.12.0</version>
    </dependency>
  </dependencies>
</project>
"""
KAFKA_POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>rebpf</groupId> <artifactId>kafka</artifactId> <version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId> <artifactId>kafka_2.13</artifactId> <version>4.2.0</version>
    </dependency>
    <dependency>
      <groupId>org.apache.kafka</groupId> <artifactId>kafka-tools</artifactId> <version>4.2.0</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId> <artifactId>slf4j-simple</artifactId> <version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
"""


def cache() -> Path:
    """Folder of downloads, outside the source tree."""
    return Path(os.environ.get("REBPF_CACHE") or Path.home() / ".cache" / "rebpf")


def kafka() -> Path:
    """Folder with the jars of Apache Kafka 4.2.0 and its tools."""
    return cached(KAFKA, _fill_kafka)


def avro() -> Path:
    """Folder with the jars of Apache Avro 1.12.0."""
    return cached(AVRO, _fill_avro)


def registry() -> Path:
    """Folder with Apicurio Registry 3.0.9, unpacked."""
    return cached(REGISTRY, _fill_registry)


def flink() -> Path:
    """Folder with venv/ (Apache Flink 2.1.1) and jars/ (connectors for Kafka and the registry)."""
    return cached(FLINK, _fill_flink)


def missing() -> list[str]:
    """Programs for the servers and readers that this machine lacks."""
    whole = all((cache() / name).is_dir() for name in (KAFKA, REGISTRY, AVRO))
    needed = ["java", "kcat", "openssl", "setpriv"] + ([] if whole else ["mvn"])
    return [program for program in needed if shutil.which(program) is None]


def flink_missing() -> list[str]:
    """Further programs for Flink that this machine lacks; empty if Flink is in the cache."""
    if (cache() / FLINK).is_dir():
        return []
    absent = [] if shutil.which("mvn") else ["mvn"]
    if sys.version_info[:2] > FLINK_PYTHON:
        absent.append("a Python of 3.12 or before")
    return absent


def cached(name: str, fill: Callable[[Path], None]) -> Path:
    """Return folder `name` of the cache; `fill` it if missing, in one process only."""
    target = cache() / name
    if target.is_dir():
        return target
    with _lock():
        if not target.is_dir():  # it may exist after the wait
            part = target.with_name(f"{name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            fill(part)
            part.rename(target)
    return target


@contextmanager
def _lock() -> Iterator[None]:
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "fetch.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill_kafka(part: Path) -> None:
    _maven(f"{PLUGIN}:copy-dependencies", "-DincludeScope=runtime", output=part, pom=KAFKA_POM)


def _fill_avro(part: Path) -> None:
    _maven(f"{PLUGIN}:copy-dependencies", "-DincludeScope=runtime", output=part, pom=AVRO_POM)


def _fill_registry(part: Path) -> None:
    _maven(f"{PLUGIN}:unpack", f"-Dartifact={REGISTRY_ARTIFACT}", output=part)


def _fill_flink(part: Path) -> None:
    # The folder is renamed later: a venv's python is relocatable, its scripts are not.
    _run([sys.executable, "-m", "venv", "venv"], cwd=part)
    pip = [str(part / "venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    _run([*pip, "install", FLINK_PACKAGE], cwd=part)
    for artifact in FLINK_CONNECTORS:
        _maven(f"{PLUGIN}:copy", f"-Dartifact={artifact}", output=part / "jars")


def _maven(*arguments: str, output: Path, pom: str | None = None) -> None:
    """Run Maven in a temporary folder with its local repository, which would remember failures."""
    with tempfile.TemporaryDirectory(dir=cache(), prefix="maven-") as scratch:
        if pom:
            Path(scratch, "pom.xml").write_text(pom)
        own = ["-q", "-B", "--strict-checksums", f"-Dmaven.repo.local={scratch}/repository"]
        command = ["mvn", *own, *arguments, f"-DoutputDirectory={output}"]
        _run(command, cwd=scratch)


def _run(command: list[str], *, cwd: str | Path) -> None:
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def main() -> int:
    """Fill the cache and print the durations."""
    if absent := missing():
        print(f"not installed: {', '.join(absent)}", file=sys.stderr)
        return 69
    fetches = [kafka, registry, avro]
    if absent := flink_missing():
        print(f"left out: {FLINK}, which needs {', '.join(absent)}", file=sys.stderr)
    else:
        fetches.append(flink)
    for fetch in fetches:
        begin = time.monotonic()
        folder = fetch()
        print(f"{folder} ({time.monotonic() - begin:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
