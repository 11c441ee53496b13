"""`rebpf config` and `rebpf check --offline`, as CI and Ansible call them."""

import json
import os
from pathlib import Path

import pytest

from producer.host.state import StateFolder
from tests.support.rebpf import as_nobody, let_others_in, rebpf

ELSEWHERE = """\
[kafka]
brokers = "kafka-1:9092"
[kafka.settings]
"security.protocol" = "SASL_SSL"
"ssl.ca.location" = "/not/here/ca.pem"
"sasl.mechanism" = "SCRAM-SHA-512"
"sasl.username" = "rebpf"
"sasl.password" = "@kafka"
[registry]
url = "https://registry:8081"
auth = "registry-auth"
ca = "/not/here/ca.pem"
[metrics]
web_config_file = "/not/here/web.yml"
[[rules]]
uid = ["nobody-here", "nor-here"]
netns = ["not-here"]
interface = ["eth99"]
address = ["@/not/here/list"]
"""
"""Valid, but not on this host."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "rebpf.toml"
    file.write_text(ELSEWHERE)
    return file


@pytest.mark.slow
def test_a_file_for_another_host_is_valid_offline(file: Path) -> None:
    done = rebpf("check", "--offline", "--config", file)
    assert (done.returncode, done.stderr) == (0, "")
    hash_ = json.loads(rebpf("config", "--config", file, "--json").stdout)["hash"]
    assert f"valid, hash {hash_}" in done.stdout


def test_an_explanation_needs_no_secret(file: Path) -> None:
    file.write_text(ELSEWHERE.partition("[[rules]]")[0])
    done = rebpf("check", "--config", file, "--explain", "10.0.0.1:443,10.0.0.2:5000")
    assert (done.returncode, done.stderr) == (0, "")
    assert "transmits kept" in done.stdout


def test_the_flink_job_needs_no_secret(file: Path) -> None:
    file.write_text(f'{ELSEWHERE}[[alert.rules]]\nname = "loss"\n')
    done = rebpf("alert", "--flink-sql", "--config", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert "INSERT INTO tcp_alerts_flink" in done.stdout


def test_offline_works_beside_a_running_producer(file: Path) -> None:
    with StateFolder(file.parent / "state") as folder:
        folder.publish({"brokers": "b:1"})
        assert rebpf("check", "--offline", "--config", file, "--state-dir", folder.path).returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[kafka]\nbrokerz = 1", "line 2: unknown key kafka.brokerz: did you mean brokers?"),
        ('[kafka.settings]\n"linger.ms" = "soon"', "line 2: kafka.settings.linger.ms: "),
        ('[kafka]\n\n[kafka.settings]\n"max.in.flight" = 6', "line 3: kafka.settings: `max.in.flight` must be"),
        ('[[rules]]\ncgroup = ["/' + "a/" * 40 + '"]', "line 1: rule 1: cgroup"),
        ("[[rules]]\n" * 1025, "rules: too many rules: 1025, at most 1024"),
        ("[capture]\nports = [1]\n[[rules]]", "line 3: rules and a filter"),
    ],
)
def test_a_wrong_file_is_refused_offline(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rebpf.toml").write_text(text)
    done = rebpf("check", "--offline", "--config", tmp_path / "rebpf.toml")
    assert done.returncode == 78
    assert message in done.stdout + done.stderr


def test_offline_needs_a_file() -> None:
    done = rebpf("check", "--offline")
    assert (done.returncode, "--offline needs --config" in done.stderr) == (64, True)


def test_config_shows_the_options_and_the_environment_and_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "rebpf.toml"
    file.write_text('[kafka]\nbrokers = "a:1"\n[kafka.settings]\n"sasl.password" = "hunter2"\n')
    done = rebpf("config", "--config", file, "--port", 443, env={"REBPF_STATE_DIR": "/run/x"})
    assert done.returncode == 0
    lines = {*done.stdout.splitlines()}
    assert {f"{line}  # option or environment" for line in ('state_dir = "/run/x"', "ports = [443]")} <= lines
    assert f'brokers = "a:1"  # {file}:2' in lines
    assert "hunter2" not in done.stdout
    shown = json.loads(rebpf("config", "--config", file, "--json").stdout)["settings"]
    assert (shown["kafka.settings.sasl.password"], shown["kafka.brokers"]) == ("***", "a:1")


def test_a_value_that_an_option_replaces_is_not_said_to_be_the_files(tmp_path: Path) -> None:
    file = tmp_path / "rebpf.toml"
    file.write_text('log_level = "warning"\n[kafka]\nbrokers = "a:1"\n')
    done = rebpf("--log-level", "debug", "config", "--config", file, env={"REBPF_BROKERS": "b:1"})
    lines = {*done.stdout.splitlines()}
    assert {f"{line}  # option or environment" for line in ('log_level = "debug"', 'brokers = "b:1"')} <= lines


@pytest.mark.parametrize("words", [["show"], ["verify"], ["drop", "--yes"]])
def test_the_spool_is_seen_in_a_shell_which_has_no_credentials_of_the_service(file: Path, words: list[str]) -> None:
    state = file.parent / "state"
    state.mkdir(mode=0o700)
    done = rebpf("spool", *words, "--config", file, "--state-dir", state)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["status"], ["reload"], ["tail"]])
def test_a_user_who_cannot_see_the_producer_is_asked_to_be_root(tmp_path: Path, words: list[str]) -> None:
    nobody = as_nobody()
    let_others_in(tmp_path)
    file = tmp_path / "rebpf.toml"
    file.write_text('[metrics]\nlisten = ""\n')
    file.chmod(0o644)
    with StateFolder(tmp_path / "state") as folder:
        folder.publish({"brokers": "b:1"})
        assert os.stat(folder.path).st_mode & 0o077 == 0
        done = rebpf(*words, "--config", file, "--state-dir", folder.path, before=nobody)
    assert done.returncode == 77
    assert "cannot be read by this user: run this as root" in done.stderr
