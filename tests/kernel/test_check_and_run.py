"""`check` exits with 0 if and only if `run` starts: real starts, with hooks, of valid and invalid configurations."""

import os
import random
import subprocess

import pytest

from producer.events import HOOKS
from tests.support.rebpf import rebpf

pytestmark = pytest.mark.root

RIGHT = [
    'metrics.listen = "127.0.0.1:0"',
    'capture.default = "drop"',
    "[[rules]]\nuid = [0]",
    '[[rules]]\ninterface = ["no-such0"]\nnetns = ["no-such"]',
    'kafka.settings."max.in.flight" = 5',
    '[[rules]]\nuid = ["nobody-of-this-name"]',
]
WRONG = [
    'metrics.listen = "127.0.0.1:99999"',
    'capture.default = "foo"',
    "[[rules]]\nuid = [-1]",
    'kafka.settings."max.in.flight" = 6',
    'kafka.settings."enable.gapless.guarantee" = true',
    'kafka.settings."delivery.report.only.error" = true',
    'kafka.settings."security.protocol" = "ssl"\nkafka.settings."ssl.ca.location" = "/none"',
    'registry.url = "http://127.0.0.1:1"\nregistry.auth = "/none"',
    '[[rules]]\naddress = ["@/none"]',
]
_ROUNDS = 8


@pytest.mark.parametrize("number", range(_ROUNDS))
def test_check_says_0_if_and_only_if_run_starts(tmp_path, number):
    draw = random.Random(number)
    text = draw.choice(RIGHT if number % 2 else WRONG)
    path = tmp_path / "rebpf.toml"
    brokers = draw.choice(["", 'kafka.brokers = "127.0.0.1:1"\nkafka.stop_timeout_s = 0\n'])
    path.write_text(f'state_dir = "{tmp_path}/state"\n{brokers}{text}\n')
    checked = rebpf("check", "--local", "--config", path)
    ran = rebpf("run", "--config", path, "--duration", "0")

    assert (checked.returncode == 0) == (ran.returncode == 0), (text, checked.stdout, ran.stderr)
    if text in RIGHT or brokers:  # the test broker always uses plain text
        assert (ran.returncode == 0) == (text in RIGHT), (text, ran.stderr)
    assert "Traceback" not in checked.stderr + ran.stderr


def test_files_of_another_user_stop_a_start_and_stay_as_they_are(tmp_path):
    path, ledger = tmp_path / "rebpf.toml", tmp_path / "state" / "ledger.transmit"
    path.write_text(f'state_dir = "{tmp_path}/state"\nmetrics.listen = "127.0.0.1:0"\n')
    assert rebpf("run", "--config", path, "--duration", "0").returncode == 0
    os.chown(ledger, 65534, 65534)
    before = ledger.read_bytes()
    checked = rebpf("check", "--local", "--config", path)
    ran = rebpf("run", "--config", path, "--duration", "0")

    assert checked.returncode == ran.returncode == 69
    assert f"MISSING state_dir: {ledger} is not readable for user 0: chown 0 {ledger} and " in checked.stdout
    assert f"ledger: [Errno 13] Permission denied: '{ledger}'" in ran.stderr
    assert ledger.read_bytes() == before
    os.chown(ledger, 0, 0)
    assert rebpf("check", "--local", "--config", path).returncode == 0


def test_a_user_namespace_is_the_reason_that_is_named(tmp_path):
    inside = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("NO USER NAMESPACE: the kernel creates none")
    options = ("--state-dir", tmp_path / "state")
    checked = rebpf("check", "--local", *options, before=inside)
    ran = rebpf("run", *options, before=inside)

    assert checked.returncode == ran.returncode == 77, (checked.stdout, ran.stderr)
    for text in (checked.stdout, ran.stderr):
        assert "its capabilities count only in its user namespace" in text
        assert "5.10" not in text


@pytest.mark.parametrize("hidden", ["/proc/sys/kernel/random", "/sys/devices/system/cpu"])
def test_files_of_the_kernel_that_a_container_hides_stop_both(tmp_path, hidden):
    inside = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh"]
    options = ("--state-dir", tmp_path / "state")
    checked = rebpf("check", "--local", *options, before=inside)
    ran = rebpf("run", *options, "--duration", "0", before=inside)

    assert checked.returncode == ran.returncode == 69, (checked.stdout, ran.stderr)
    for text in (checked.stdout, ran.stderr):
        assert f"{hidden}/" in text


@pytest.mark.parametrize("hook", HOOKS)
def test_check_says_of_each_hook_what_run_finds(tmp_path, hook):
    path = tmp_path / "rebpf.toml"
    settings = ['metrics.listen = "127.0.0.1:0"', f'capture.hooks = ["{hook}"]']
    path.write_text("\n".join([f'state_dir = "{tmp_path}/state"', *settings, ""]))
    checked = rebpf("check", "--local", "--config", path)
    ran = rebpf("run", "--config", path, "--duration", "0")

    assert (checked.returncode == 0) == (ran.returncode == 0), (checked.stdout, ran.stderr)
    available = all(f" {stream} by {hook}: available" in checked.stdout for stream in ("transmit", "retransmit"))
    assert available == (ran.returncode == 0), (checked.stdout, ran.stderr)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_lock_that_is_no_file_stops_check_and_run(tmp_path, kind):
    lock = tmp_path / "state" / "lock"
    lock.parent.mkdir(mode=0o700)
    {"link": lambda: lock.symlink_to("nowhere"), "folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock)}[kind]()
    checked = rebpf("check", "--local", "--state-dir", lock.parent)
    ran = rebpf("run", "--state-dir", lock.parent, "--duration", "0")

    assert checked.returncode == ran.returncode == 78
    assert ran.stderr.strip().removeprefix("rebpf: ") in checked.stdout


def both(folder, text="", **how):
    """Return what `check` and `run` say, which must agree on whether a start succeeds."""
    path = folder / "rebpf.toml"
    path.write_text(f'state_dir = "{folder}/state"\nkafka.brokers = "127.0.0.1:1"\nkafka.stop_timeout_s = 0\n{text}')
    checked = rebpf("check", "--local", "--config", path, **how)
    ran = rebpf("run", "--config", path, "--duration", "0", **how)
    assert (checked.returncode == 0) == (ran.returncode == 0), (checked.stdout, ran.stderr)
    assert "Traceback" not in checked.stderr + ran.stderr
    return checked, ran


@pytest.mark.parametrize("limit", [32, 64, 127, 128])
def test_a_limit_on_descriptors_is_enough_for_both_or_for_none(tmp_path, limit):
    checked, _ = both(tmp_path, before=["prlimit", f"--nofile={limit}:{limit}"])
    assert checked.returncode == (0 if limit >= 128 else 69)


@pytest.mark.parametrize("name", ["ssl.key.location", "ssl.certificate.location", "ssl.ca.location"])
def test_a_file_that_only_another_user_may_read_stops_both(tmp_path, name):
    """Root's producer has dropped the capability to read all files when its client starts."""
    path = tmp_path / "file.pem"
    path.touch(mode=0o600)
    os.chown(path, 65534, 65534)
    checked, ran = both(tmp_path, f'kafka.settings."security.protocol" = "ssl"\nkafka.settings."{name}" = "{path}"')
    assert checked.returncode == ran.returncode == 78
    for said in (checked.stdout, ran.stderr):
        assert f"kafka.settings.{name}: {path}: Permission denied: chown 0 {path}" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "443"), ("ADDRESS", "10.0.0.1"), ("PIN", "/nowhere"), ("PODS_URL", "x"), ("PORT", "443 5432")],
)
def test_the_environment_counts_for_both(tmp_path, name, value):
    checked, ran = both(tmp_path, "[[rules]]\nport = [80]\n", env={f"REBPF_{name}": value})
    assert checked.returncode == ran.returncode == 78


@pytest.mark.parametrize("mode", [0, 0o700])
@pytest.mark.parametrize("name", ["", "spool", "spool/transmit", "quarantine", "compiled"])
@pytest.mark.parametrize("transmit", ["true", "false"])
def test_folders_that_their_owner_may_not_use_stop_both_or_none(tmp_path, name, mode, transmit):
    folder = tmp_path / "state" / name
    for each in reversed([folder, *(above for above in folder.parents if tmp_path in above.parents)]):
        each.mkdir(mode=0o700)
    folder.chmod(mode)
    try:
        both(tmp_path, f"capture.transmit = {transmit}")
    finally:
        folder.chmod(0o700)
