"""Values that a library would cut, misread or wait for: each is an error that names the setting."""

import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from producer.config import validate
from producer.config.convert import build
from producer.config.librdkafka import FILES, admin_settings, client_settings, consumer_settings
from producer.config.load import Config, Registry, load, read_secret
from producer.errors import ConfigError, UnavailableError
from producer.host import pods, state_file
from producer.kafka import librdkafka
from producer.kernel.btf import Btf
from producer.registry.client import RegistryClient
from tests.support.client_settings import FREE_OF_ALL

DEPTHS = {
    "dotted": ".".join("a" * 5000) + " = 1",
    "a header": "[" + ".".join("a" * 5000) + "]",
    "inline": "a = " + "{b = " * 40 + "1" + "}" * 40,
    "lists": "a = " + "[" * 40 + "]" * 40,
    "below a setting": "labels." + ".".join("a" * 5000) + " = 1",
}


@pytest.fixture(params=["pipe", "device"])
def not_a_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "device":
        return Path("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("text", DEPTHS.values(), ids=DEPTHS)
def test_tables_of_any_depth_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "rebpf.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"rebpf\.toml: tables or lists are nested too deeply$"):
        load(tmp_path / "rebpf.toml")


def test_an_empty_key_is_shown(tmp_path: Path) -> None:
    (tmp_path / "rebpf.toml").write_text('"" = 1')
    with pytest.raises(ConfigError, match="unknown key ''"):
        load(tmp_path / "rebpf.toml")


@pytest.mark.parametrize("client", [client_settings, consumer_settings, admin_settings])
@pytest.mark.parametrize("name", sorted(FILES))
def test_librdkafka_gets_no_pipe_and_no_device(client: Callable[..., object], name: str, not_a_file: Path) -> None:
    with pytest.raises(ConfigError, match=rf"kafka\.settings\.{name}: .*: expected a regular file"):
        client("b:1", {name: str(not_a_file)})


def test_each_setting_that_is_a_file_is_known() -> None:
    assert {name for name in FREE_OF_ALL if name.endswith((".location", ".file", ".keytab"))} == FILES


@pytest.mark.parametrize("name", ["ca", "certificate", "key"])
def test_the_registrys_client_opens_no_pipe_and_no_device(name: str, not_a_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"registry: .*expected a regular file"):
        RegistryClient(Registry(url="https://127.0.0.1:1", **{name: not_a_file}))


@pytest.mark.parametrize("name", ["token", "ca"])
def test_the_list_of_pods_opens_no_pipe_and_no_device(tmp_path: Path, name: str, not_a_file: Path) -> None:
    (tmp_path / "token").write_text("t")
    files = {"token": tmp_path / "token", "ca": tmp_path / "ca", name: not_a_file}
    with pytest.raises(state_file.NotAFileError, match="expected a regular file"):
        list(pods._fetch(pods.PodSource("https://127.0.0.1:1/pods", **files), threading.Event()))


def test_btf_is_read_from_no_pipe_and_no_device(not_a_file: Path) -> None:
    with pytest.raises(UnavailableError, match="expected a regular file"):
        Btf.load(not_a_file)


TRUNCATED = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 1000, 1000, 0)


@pytest.mark.parametrize("content", [None, TRUNCATED, TRUNCATED[:4] + b"\xff" * 20], ids=["folder", "cut", "offsets"])
def test_damaged_btf_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "btf"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UnavailableError, match=f"{path}: (Is a directory|truncated BTF)"):
        Btf.load(path)


@pytest.mark.parametrize("content", ["pass\0word", "\0"])
def test_a_secret_is_not_cut(tmp_path: Path, content: str) -> None:
    (tmp_path / "secret").write_text(content)
    with pytest.raises(ConfigError, match="expected a secret without NUL"):
        read_secret(tmp_path / "secret", "kafka.settings.sasl.password")


@pytest.mark.parametrize("secret", ["a\x0bb", "a\x0cb", "a\x1cb", "a\x85b", "a\u2028b", "a\rb", " a "])
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\nsecond line"])
def test_only_a_line_feed_ends_the_line_of_a_secret(tmp_path: Path, secret: str, end: str) -> None:
    (tmp_path / "secret").write_bytes((secret + end).encode())
    assert read_secret(tmp_path / "secret", "where") == secret


@pytest.mark.parametrize(
    ("brokers", "protocol"),
    [
        ("foo://a:1", None),
        ("SSL://a:1", None),
        ("a:1,sasl_ssl://b:1", "SASL_PLAINTEXT"),
        ("plaintext://a:1", "ssl"),
        ("a:\u0663", None),
        ("a:\uff11", None),
    ],
)
def test_brokers_that_librdkafka_would_leave_out(brokers: str, protocol: str | None) -> None:
    settings = {"security.protocol": protocol} if protocol else {}
    with pytest.raises(ConfigError, match=r"kafka\.brokers: expected"):
        validate.check(build(Config, {"kafka": {"brokers": brokers, "settings": settings}}))


@pytest.mark.parametrize(("brokers", "protocol"), [("PLAINTEXT://a:1", None), ("ssl://a,SSL://b:2", "SSL")])
def test_brokers_may_have_the_protocol_of_the_settings(brokers: str, protocol: str | None) -> None:
    settings = {"security.protocol": protocol} if protocol else {}
    validate.check(build(Config, {"kafka": {"brokers": brokers, "settings": settings}}))


@pytest.mark.parametrize("shift", range(4))
def test_an_error_of_the_library_may_be_cut_inside_a_character(shift: int) -> None:
    value = "a" * shift + "\U0001f600" * 500
    with pytest.raises(ConfigError, match=r"kafka\.settings\.compression\.codec: Invalid value"):
        librdkafka.check_settings({"compression.codec": value}, ())


def test_an_error_of_the_library_has_no_line_break() -> None:
    with pytest.raises(ConfigError, match=r"outside allowed range 1\.\.2147483647$"):
        librdkafka.check_settings({"batch.size": "0"}, ())


def test_too_many_rules_are_refused_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "rebpf.toml").write_text("[[rules]]\nunknown = 1\n" * 1025)
    with pytest.raises(ConfigError, match=r"line 1: rules: too many rules: 1025, at most 1024"):
        load(tmp_path / "rebpf.toml")


@pytest.mark.parametrize("fragments", [0, 200])
def test_the_files_together_are_bounded(tmp_path: Path, fragments: int) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "rebpf.toml").write_text("# " + "\u00e9" * ((1 << 21) - 1) + "a" * (fragments == 0))
    for number in range(fragments):
        (tmp_path / f"conf.d/{number:03}.toml").write_text("#" if number == fragments - 1 else "")
    last = "conf.d/199.toml: expected the files up to this one to have" if fragments else "rebpf.toml: expected"
    with pytest.raises(ConfigError, match=rf"{last} at most 4194304 bytes"):
        load(tmp_path / "rebpf.toml")
