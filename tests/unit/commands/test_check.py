"""`rebpf check` on hosts that lack something: each lack is made for real, in a mount namespace where it takes one."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from producer.commands.check import _unusable, examine
from producer.commands.check_settings import settings
from producer.config.load import Config
from producer.host.state import StateFolder
from tests.support.rebpf import as_nobody, let_others_in, rebpf

pytestmark = pytest.mark.slow

root = pytest.mark.root


@pytest.fixture(scope="session")
def mounts() -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("NO MOUNT NAMESPACE: it needs root and unshare")


def inside(script: str) -> Sequence[str]:
    """Return what runs a command in a mount namespace of its own, after a shell's script."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", f'{script}\nexec "$@"', "sh"]


def check(folder: Path, *arguments: object, config: str = "", before: Sequence[str] = ()) -> tuple[int, dict[str, str]]:
    """Return the exit code of `rebpf check`, and its lines by subject; the last of a subject counts."""
    path = folder / "rebpf.toml"
    path.write_text(f'state_dir = "{folder}/state"\n{config}')
    done = rebpf("check", "--config", path, *arguments, before=before)
    assert done.stderr == ""
    return done.returncode, {line[8:].partition(": ")[0]: line for line in done.stdout.splitlines()}


def test_json_says_the_same(tmp_path):
    # Not the default port, which a producer of another test may take meanwhile.
    code, found = check(tmp_path, config=f'capture.btf = "{tmp_path}/none"\nmetrics.listen = "127.0.0.1:0"')
    done = rebpf("check", "--config", tmp_path / "rebpf.toml", "--json")
    findings = json.loads(done.stdout)

    assert code == done.returncode == max(finding["exit_code"] for finding in findings)
    assert [line[8:] for line in found.values()] == [f"{each['subject']}: {each['text']}" for each in findings]
    assert [line.startswith("MISSING") for line in found.values()] == [not each["ok"] for each in findings]
    assert [line.startswith("WARNING") for line in found.values()] == [each["warning"] for each in findings]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ports = [443]", "none: only capture.addresses and capture.ports are captured"),
        ('default = "drop"', "none: by capture.default, no segments are captured"),
    ],
)
def test_without_rules_it_says_what_is_captured(tmp_path, text, expected):
    _, found = check(tmp_path, config=f"[capture]\n{text}\n")
    assert found["rules"] == f"ok      rules: {expected}"


@root
def test_a_host_that_has_everything(tmp_path):
    code, found = check(tmp_path)

    assert code == 0
    assert found["rules"] == "ok      rules: none: all segments are captured"
    assert found["bcc"].startswith("ok      bcc: 0.")
    assert not (tmp_path / "state").exists(), "nothing is written"


@pytest.mark.parametrize("name", ["", "(none)", "localhost", "web-17"])
def test_a_host_without_a_name_of_its_own_is_a_warning(tmp_path, name):
    """The key of its events, and the host in alerts, would be those of all such hosts."""
    findings = {each.subject: each for each in settings(Config(host=name, state_dir=tmp_path))}
    assert ("host" in findings) == (name != "web-17")
    if name != "web-17":
        assert (findings["host"].exit_code, findings["host"].warns) == (0, True)


@root
@pytest.mark.parametrize("is_there", [False, True])
def test_a_file_that_is_no_btf(tmp_path, is_there):
    path = tmp_path / "btf"
    if is_there:
        path.write_bytes(b"\x7fELF, and no BTF")
    code, found = check(tmp_path, config=f'capture.btf = "{path}"')

    assert code == 69
    assert found["BTF"].startswith(f"MISSING BTF: {path}")
    assert ("CONFIG_DEBUG_INFO_BTF=y" in found["BTF"]) != is_there
    assert found["BTF"].endswith("; or remove capture.btf to use the BTF of the running kernel")


@root
def test_a_kernel_without_btf(mounts, tmp_path):
    code, found = check(tmp_path, before=inside("mount -t tmpfs none /sys/kernel/btf"))

    assert code == 69
    assert found["BTF"].startswith("MISSING BTF: /sys/kernel/btf/vmlinux is missing: ")
    assert found["BTF"].endswith(": apt install linux-image-$(dpkg --print-architecture)")


def without(*capabilities: str) -> Sequence[str]:
    names = ",".join(f"-{name}" for name in ("sys_admin", *capabilities))
    command = ["setpriv", f"--bounding-set={names}", f"--inh-caps={names}"]
    if not shutil.which("setpriv") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("giving up capabilities needs root and setpriv")
    return command


@root
@pytest.mark.parametrize("name", ["bpf", "perfmon"])
def test_a_capability_that_loading_needs(tmp_path, name):
    code, found = check(tmp_path, before=without(name))

    assert code == 77
    assert found["capabilities"].startswith(f"MISSING capabilities: missing: CAP_{name.upper()}; run as root, or run")
    assert found["capabilities"].endswith("AmbientCapabilities=CAP_NET_ADMIN CAP_PERFMON CAP_BPF")


@root
def test_a_capability_that_one_hook_needs(tmp_path):
    """Where that hook is the only one, it is an error."""
    code, found = check(tmp_path, config='capture.hooks = ["cgroup_skb"]', before=without("net_admin"))

    assert found["capabilities"].startswith(
        "no      capabilities: missing: CAP_NET_ADMIN, which the hook cgroup_skb needs; run as root, or run "
    )
    assert code == 69
    assert found["transmit"] == ("MISSING transmit: this host supports none of the hooks in capture.hooks: cgroup_skb")
    assert found["transmit by cgroup_skb"] == "no      transmit by cgroup_skb: egress: Operation not permitted"


@root
@pytest.mark.parametrize("level", [2, 3])
def test_perf_events_for_root_alone(mounts, tmp_path, level):
    """Debian's kernels have the level 3, which others do not know."""
    (tmp_path / "level").write_text(f"{level}\n")
    before = inside(f"mount --bind {tmp_path}/level /proc/sys/kernel/perf_event_paranoid")

    assert "perf_event_paranoid" not in check(tmp_path, before=before)[1]
    _, found = check(tmp_path, before=[*before, *without()])
    assert ("perf_event_paranoid" in found) == (level == 3)
    if level == 3:
        assert found["perf_event_paranoid"].startswith("no      perf_event_paranoid: 3, so the kernel may allow ")
        assert found["perf_event_paranoid"].endswith(": sysctl kernel.perf_event_paranoid=2")
    _, found = check(tmp_path, config='capture.hooks = ["fentry", "raw_tp"]', before=[*before, *without()])
    assert "perf_event_paranoid" not in found


@root
@pytest.mark.parametrize("mode", ["integrity", "confidentiality"])
def test_lockdown(mounts, tmp_path, mode):
    modes = "none integrity confidentiality".replace(mode, f"[{mode}]")
    there = f"mount -t tmpfs none /sys/kernel/security; echo '{modes}' >/sys/kernel/security/lockdown"
    code, found = check(tmp_path, before=inside(there))

    if mode == "integrity":
        assert (code, found["lockdown"]) == (0, "ok      lockdown: integrity")
    else:
        assert code == 69
        assert found["lockdown"].startswith("MISSING lockdown: /sys/kernel/security/lockdown is confidentiality")
        assert "lockdown=integrity" in found["lockdown"]


@root
def test_cgroup_v2_not_mounted(mounts, tmp_path):
    script = "for at in $(awk '$3 == \"cgroup2\" { print $2 }' /proc/self/mounts); do umount -l $at; done"
    code, found = check(tmp_path, config='capture.hooks = ["cgroup_skb"]', before=inside(script))

    assert found["cgroup v2"].startswith("no      cgroup v2: not mounted")
    assert "mount -t cgroup2 none" in found["cgroup v2"]
    assert code == 69
    assert found["transmit"].startswith("MISSING transmit: this host supports none of the hooks")
    assert (
        found["transmit by cgroup_skb"] == "no      transmit by cgroup_skb: egress: no cgroup v2 file system is mounted"
    )


BCC = Path("/usr/lib/python3/dist-packages/bcc")


@root
@pytest.mark.skipif(not BCC.is_dir(), reason=f"NO BCC in {BCC}")
@pytest.mark.parametrize(
    ("content", "begins", "ends"),
    [
        (
            None,
            "bcc is missing: install the package python3-bpfcc (Debian, Ubuntu)",
            " or python3-bcc (Fedora, RHEL)",
        ),
        (
            '__version__ = "0.18.0"',
            "expected 0.26 or later, found 0.18.0 of /",
            ": install python3-bpfcc of a newer release",
        ),
        (
            "import no_such_library",
            "/",
            ": ModuleNotFoundError: No module named 'no_such_library'; apt install --reinstall python3-bpfcc",
        ),
    ],
    ids=["missing", "too old", "broken"],
)
def test_bcc_missing_too_old_or_broken(mounts, tmp_path, content, begins, ends):
    """In the place of the distribution's lies another, or none."""
    other = tmp_path / "bcc"
    other.mkdir()
    if content is not None:
        (other / "__init__.py").write_text(content)
        (other / "libbcc.py").touch()
    code, found = check(tmp_path, before=inside(f"mount --bind {other} {BCC}"))

    assert code == 69
    assert found["bcc"].startswith(f"MISSING bcc: {begins}")
    assert found["bcc"].endswith(ends)


def test_a_mistake_in_the_file_is_named_with_its_line_and_the_nearest_key(tmp_path):
    path = tmp_path / "rebpf.toml"
    path.write_text('[kafka]\nbrokers = "a:1"\ntopik_prefix = "x"\n')
    text, in_json = rebpf("check", "--config", path), rebpf("check", "--config", path, "--json")

    says = f"{path}: line 3: unknown key kafka.topik_prefix: did you mean topic_prefix?"
    assert (text.returncode, text.stderr) == (78, f"rebpf: {says}\n")
    assert in_json.returncode == 78
    (finding,) = json.loads(in_json.stdout)
    assert (finding["subject"], finding["text"], finding["exit_code"]) == ("configuration", says, 78)


@pytest.mark.parametrize(
    ("config", "subject", "says"),
    [
        (
            '[kafka.settings]\n"lingr.ms" = 5',
            "kafka.settings",
            'line 3: kafka.settings.lingr.ms: No such configuration property: "lingr.ms": did you mean linger.ms?',
        ),
        (
            '[kafka.settings]\n"compression.codec" = "soon"',
            "kafka.settings",
            'line 3: kafka.settings.compression.codec: Invalid value "soon" for configuration property '
            '"compression.codec"',
        ),
        (
            '[[rules]]\nport = [1]\n[[rules]]\nname = "web"\naddress = ["@/no/such/file"]',
            "rules",
            "line 4: rule 2 web: /no/such/file: No such file or directory",
        ),
    ],
)
def test_invalid_settings(tmp_path, config, subject, says):
    code, found = check(tmp_path, config=config)

    assert code == 78
    assert found[subject] == f"MISSING {subject}: {tmp_path}/rebpf.toml: {says}"


def test_a_state_folder_that_is_not_a_folder(tmp_path):
    (tmp_path / "state").touch()
    code, found = check(tmp_path)

    assert code == 78
    assert found["state_dir"] == (
        f"MISSING state_dir: {tmp_path}/state is not a folder: remove it, or set state_dir to another path"
    )


@root
def test_folders_of_another_user(tmp_path):
    let_others_in(tmp_path)
    code, found = check(tmp_path, before=as_nobody())
    assert code == 78
    assert found["state_dir"] == (
        f"MISSING state_dir: {tmp_path}/state is not writable for user 65534: "
        f"install -d -m 0700 -o 65534 {tmp_path}/state"
    )

    for name in ("spool", "quarantine"):
        (tmp_path / "state" / name).mkdir(parents=True)
    os.chown(tmp_path / "state", 65534, 65534)
    code, found = check(tmp_path, before=as_nobody())
    assert code == 78
    assert found["state_dir"] == f"ok      state_dir: {tmp_path}/state is writable"
    for name, label in (("spool", "MISSING"), ("quarantine", "WARNING")):
        assert found[f"state_dir/{name}"] == (
            f"{label} state_dir/{name}: {tmp_path}/state/{name} is not writable for user 65534: "
            f"install -d -m 0700 -o 65534 {tmp_path}/state/{name}"
        )


@root
def test_the_folder_of_the_service_is_no_problem_for_the_root_who_checks_it(tmp_path, monkeypatch):
    monkeypatch.setattr("producer.commands.check_settings.SERVICE_USER", "nobody")
    os.chown(tmp_path, 65534, 65534)
    config = Config().with_values(state_dir=tmp_path)
    (finding,) = (each for each in examine(config, servers=False) if each.subject == "state_dir")
    assert (finding.exit_code, finding.warns) == (0, True)
    assert finding.text == f"{tmp_path} belongs to the service's user rebpf: the service can use it, but not root"


@root
def test_a_spools_folder_of_another_user(tmp_path):
    let_others_in(tmp_path)
    own, others = tmp_path / "state" / "spool", tmp_path / "state" / "spool" / "transmit"
    others.mkdir(parents=True)
    others.chmod(0o700)
    for each in (own.parent, own):
        os.chown(each, 65534, 65534)
    code, found = check(tmp_path, config='kafka.brokers = "127.0.0.1:1"', before=as_nobody())
    assert code == 78
    assert found["state_dir/spool/transmit"].startswith(
        f"MISSING state_dir/spool/transmit: {others} is not writable for user 65534"
    )


@pytest.mark.parametrize("kind", [Path.touch, os.mkfifo, lambda path: path.symlink_to(path)])
@pytest.mark.parametrize("config", ["", 'kafka.brokers = "127.0.0.1:1"\ncapture.transmit = false'])
def test_something_else_in_place_of_the_spool_which_a_start_renames(tmp_path, kind, config):
    (tmp_path / "state").mkdir(mode=0o700)
    kind(tmp_path / "state" / "spool")
    assert not [each for each in check(tmp_path, "--local", config=config)[1] if each.startswith("state_dir/")]


@root
def test_a_read_only_disk(mounts, tmp_path):
    (tmp_path / "state").mkdir()
    code, found = check(tmp_path, before=inside(f"mount -t tmpfs -o ro none {tmp_path}/state"))

    assert code == 78
    assert found["state_dir"] == (
        f"MISSING state_dir: {tmp_path}/state is read-only: mount -o remount,rw, or set state_dir to another folder"
    )


@root
def test_a_disk_too_small_for_the_spool(mounts, tmp_path):
    (tmp_path / "state").mkdir()
    code, found = check(tmp_path, before=inside(f"mount -t tmpfs -o size=64m,mode=0700 none {tmp_path}/state"))

    assert code == 0
    assert found["spool"].startswith(f"WARNING spool: {tmp_path}/state has space for 64 MiB, but [spool] allows 1728")
    assert "lower the limits in [spool]" in found["spool"]


@root
def test_pins_that_are_not_in_a_bpffs(tmp_path):
    code, found = check(tmp_path, config=f'capture.pin = "{tmp_path}/pins"')

    assert code == 78
    assert found["capture.pin"] == (
        f"MISSING capture.pin: {tmp_path}/pins is not in a bpffs: mount -t bpf bpf /sys/fs/bpf"
    )


@root
def test_pins_in_a_bpffs_of_another_user(mounts, tmp_path):
    let_others_in(tmp_path)
    pins = tmp_path / "pins"
    pins.mkdir()
    before = inside(f"mount -t bpf -o mode=0755 none {pins}")
    code, found = check(tmp_path, config=f'capture.pin = "{pins}/rebpf"', before=before)
    assert (code, found["capture.pin"]) == (0, f"ok      capture.pin: {pins}/rebpf is writable")

    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", 65534, 65534)
    code, found = check(tmp_path, config=f'capture.pin = "{pins}/rebpf"', before=[*before, *as_nobody()])
    assert code == 78
    assert found["capture.pin"] == (
        f"MISSING capture.pin: {pins}/rebpf is not writable for user 65534: install -d -m 0700 -o 65534 {pins}/rebpf"
    )


@root
def test_another_producer(tmp_path):
    """As far as others see it: it holds the lock, and has said who it is."""
    with StateFolder(tmp_path / "state") as state:
        state.publish({})
        code, found = check(tmp_path)

    assert code == 75
    assert found["producer"] == (
        f"MISSING producer: another producer runs with state_dir {tmp_path}/state: pid {os.getpid()}; "
        "see `rebpf status`"
    )
    assert "producer" not in check(tmp_path)[1]


def test_check_local_asks_no_server(tmp_path):
    _, found = check(tmp_path, "--local", "--brokers", "127.0.0.1:1", "--registry", "http://127.0.0.1:1")

    assert not {"Kafka", "registry"} & found.keys()


@pytest.mark.root
@pytest.mark.parametrize("path", ["/proc/rebpf", "/sys/rebpf/state", "/sys/fs/bpf/rebpf"])
def test_a_folder_of_the_kernel_is_no_state_folder(path: str) -> None:
    assert "cannot hold files" in _unusable(Path(path))
