"""Configuration files, the file of the endpoint's TLS and passwords, and the command line."""

import contextlib
import io
import json
import logging
import os
import ssl
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from producer.cli import main
from producer.config.librdkafka import client_settings
from producer.config.load import Config, load, located
from producer.errors import ConfigError, RebpfError
from producer.health.web_config import WebSettings
from producer.host.cgroups import cgroup2_root
from producer.rules.resolve import resolve
from tests.fuzz.engine import Check, FindingError, Target
from tests.fuzz.mutation import HOSTILE, NUMBERS, mutated, mutated_json
from tests.support.servers.certificates import Authority

_SEEDS = (
    b"""host = "web-17"
state_dir = "/tmp/rebpf"
[capture]
hooks = ["raw_tp", "cgroup_skb"]
addresses = ["10.0.0.1", "2001:db8::1"]
ports = [443]
default = "keep"
latency_s = 0.1
transmit_ring_bytes = 16777216
[kafka]
brokers = "127.0.0.1:1"
topic_prefix = "a."
stop_timeout_s = 3
[kafka.settings]
"linger.ms" = 5
"compression.type" = "zstd"
"message.max.bytes" = 1000000
[metrics]
listen = "127.0.0.1:0"
[spool]
when_full = "drop_oldest"
max_age_s = 60.5
[registry]
url = "http://127.0.0.1:1"
timeout_s = 1
""",
    b"""[capture]
default = "drop"
[[rules]]
name = "all"
address = ["10.0.0.0/8", "::/0"]
port = [443, "8000-8999"]
action = "keep"
sample = 10
[[rules]]
uid = [0, "root"]
cgroup = ["/system.slice"]
unit = ["ssh.service"]
interface = ["lo"]
netns = [4026531840]
state = ["ESTABLISHED"]
transmit = "drop"
retransmit = "keep"
""",
    b"""[alert]
group = "g"
alertmanager = "http://127.0.0.1:1"
missed_heartbeats = 3
[[alert.rules]]
name = "r"
by = "host"
measure = "ratio"
window_s = 60
threshold = 0.5
clear = 0.1
minimum = 100
""",
)
_SECRET = "hunter2hunter2"
_WEB = (
    b"""tls_server_config:
  cert_file: server.pem
  key_file: server.key
  client_auth_type: RequireAndVerifyClientCert
  client_ca_file: authority.pem
  client_allowed_sans: [prometheus, "::1"]
  min_version: TLS12
  max_version: TLS13
  prefer_server_cipher_suites: no
  cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_AES_128_GCM_SHA256]
http_server_config:
  http2: false
  headers: {X-Frame-Options: deny, Strict-Transport-Security: max-age=1}
basic_auth_users:
  alice: $2y$04$aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
""",
    b"basic_auth_users: {alice: hunter2hunter2}\n",
    b"tls_server_config: &a {cert: *a, key_file: !!python/object/apply:os.getpid []}\n<<: *a\n? [b]\n: |\n  c\n",
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nbasic_auth_users: &d {? *c : *c, e: *d}\n",
)
_WEB_VALUES = {
    "tls_server_config": {"cert_file": "server.pem", "key_file": "server.key", "curve_preferences": ["X25519"]},
    "http_server_config": {"http2": "true", "headers": {"X-Frame-Options": "deny"}},
    "basic_auth_users": {"alice": "$2y$04$" + "a" * 53},
    "rate_limit": {"burst": 1},
}
_VALUES = [
    *map(str, NUMBERS),
    *(text for text in HOSTILE if "\0" not in text),
    "127.0.0.1:99999",
    "[::1]:0",
    "nan",
    "1e9",
]
_OPTIONS = (
    "--config",
    "--brokers",
    "--registry",
    "--state-dir",
    "--explain",
    "--json",
    "--local",
    "--log-format",
    "--log-level",
    "--pin",
)
_DOCUMENTED = {0, 64, 65, 69, 75, 77, 78, 130}


@contextlib.contextmanager
def _files() -> Iterator[Check]:
    """A file loads and its rules resolve, or it raises a ConfigError of one line."""
    root = cgroup2_root()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rebpf.toml"

        def check(content: bytes) -> None:
            path.write_bytes(content)
            try:
                config = load(path)
                with located(path):
                    client_settings(config.kafka.brokers, config.kafka.settings)
                    resolve(config, root).tables()
            except ConfigError as error:
                _one_line(str(error))

        yield check


@contextlib.contextmanager
def _web_files() -> Iterator[Check]:
    """A file is in force, or rejected in one line without a password; a change never removes protection."""
    now_s = 0.0
    with tempfile.TemporaryDirectory() as name:
        authority, folder = Authority(Path(name) / "authority"), Path(name)
        server = authority.issue("server")
        for source, target in (server.certificate, "server.pem"), (server.key, "server.key"):
            (folder / target).write_bytes(source.read_bytes())
        (folder / "authority.pem").write_bytes(authority.certificate.read_bytes())
        path = folder / "web.yml"
        path.write_bytes(_WEB[0])
        running = WebSettings(path, lambda: now_s)

        def check(content: bytes) -> None:
            nonlocal now_s
            path.write_bytes(content)
            try:
                WebSettings(path)
            except ConfigError as error:
                _one_line(str(error))
                if _SECRET in str(error):
                    raise FindingError(f"the message has the password: {error}") from error
            now_s += 100
            web = running.current()
            if web.tls is None or web.tls.verify_mode != ssl.CERT_REQUIRED or not web.users:
                raise FindingError("a change has removed TLS, certificates or passwords")

        yield check


@contextlib.contextmanager
def _command_lines() -> Iterator[Check]:
    """A command line ends with a documented exit code and one line, and without a traceback."""
    with tempfile.TemporaryDirectory() as folder, _kept_logging():
        path = Path(folder) / "rebpf.toml"

        def check(example: tuple[bytes, dict[str, str], list[str]]) -> None:
            content, environment, options = example
            path.write_bytes(content)
            arguments = ["check", "--local", "--state-dir", folder, "--config", str(path), *options]
            code, text = _run(arguments, environment)
            if code not in _DOCUMENTED or "Traceback" in text or "internal error" in text:
                raise FindingError(f"exit code {code} of {arguments}: {text[-2000:]}")

        yield check


def _run(arguments: list[str], environment: dict[str, str]) -> tuple[Any, str]:
    """Run the command in this process; return its exit code and standard error."""
    before, argv, err = dict(os.environ), sys.argv, io.StringIO()
    os.environ.update(environment)
    sys.argv = ["rebpf", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            main.main()
    except SystemExit as end:
        return end.code, err.getvalue()
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _kept_logging() -> Iterator[None]:
    """Restore logging, which the command line sets up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("producer").setLevel(logging.NOTSET)


@contextlib.contextmanager
def _values() -> Iterator[Check]:
    """Values from the command line are rejected in one line, or applied."""

    def check(values: dict[str, Any]) -> None:
        try:
            config = Config().with_values(**values)
            client_settings(config.kafka.brokers, config.kafka.settings)
        except RebpfError as error:
            _one_line(str(error))

    yield check


def _one_line(text: str) -> None:
    if len(text.splitlines()) != 1:
        raise FindingError(f"the message has not one line: {text!r}")


_words = st.sampled_from(_VALUES)
_option = st.one_of(
    st.tuples(st.sampled_from(_OPTIONS), _words).map(list), _words.map(lambda word: [word]), st.just(["--json"])
)
_ENVIRONMENT = ("REBPF_BROKERS", "REBPF_REGISTRY", "REBPF_EXPLAIN", "REBPF_LOCAL", "REBPF_JSON", "REBPF_LOG_LEVEL")
_command = st.tuples(
    mutated(_SEEDS),
    st.dictionaries(
        st.sampled_from(_ENVIRONMENT), st.sampled_from([v for v in _VALUES if "\udcff" not in v]), max_size=2
    ),
    st.lists(_option, max_size=3).map(lambda lists: [word for words in lists for word in words]),
)
_web = st.one_of(
    mutated(_WEB),
    mutated_json([_WEB_VALUES]).map(lambda values: json.dumps(values, ensure_ascii=False).encode(errors="replace")),
)
_laid_over = st.fixed_dictionaries(
    {}, optional={"kafka__brokers": _words, "registry__url": _words, "state_dir": _words.map(Path)}
)

TARGETS = (
    Target("config", mutated(_SEEDS), _files, 300),
    Target("web_config", _web, _web_files, 40),
    Target("values", _laid_over, _values, 60),
    Target("command", _command, _command_lines, 25),
)
assert all(tomllib.loads(seed.decode()) for seed in _SEEDS)
