"""`rebpf check` on hosts that lack something: each lack is made for real, in a mount namespace where it takes one."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from producer.commands.check_settings import settings
from producer.config.load import Config
from tests.support.check import check, inside
from tests.support.rebpf import rebpf

pytestmark = pytest.mark.slow

root = pytest.mark.root


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
