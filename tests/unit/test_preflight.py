"""`rebpf check` on hosts that lack something: each lack is made for real, in a mount namespace where it takes one."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from producer.events import Topic
from producer.preflight_servers import _topic
from producer.provision import TopicFacts
from producer.state import StateFolder
from tests.kafka.rebpf import as_nobody, rebpf

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
    code, found = check(tmp_path, config=f'capture.btf = "{tmp_path}/none"')
    done = rebpf("check", "--config", tmp_path / "rebpf.toml", "--json")
    findings = json.loads(done.stdout)

    assert code == done.returncode == max(finding["exit_code"] for finding in findings)
    assert [line[8:] for line in found.values()] == [f"{each['subject']}: {each['text']}" for each in findings]
    assert [line.startswith("MISSING") for line in found.values()] == [not each["ok"] for each in findings]
    assert [line.startswith("WARNING") for line in found.values()] == [each["warning"] for each in findings]


@root
def test_a_host_that_has_everything(tmp_path):
    code, found = check(tmp_path)

    assert code == 0
    assert found["rules"] == "ok      rules: none: no segment is left out by a rule"
    assert found["bcc"].startswith("ok      bcc: 0.")
    assert not (tmp_path / "state").exists(), "nothing is written"


@pytest.mark.parametrize("is_there", [False, True])
def test_no_btf(tmp_path, is_there):
    path = tmp_path / "btf"
    if is_there:
        path.write_bytes(b"\x7fELF, and no BTF")
    code, found = check(tmp_path, config=f'capture.btf = "{path}"')

    assert code >= 69
    assert found["BTF"].startswith(f"MISSING BTF: {path}")
    assert ("CONFIG_DEBUG_INFO_BTF=y" in found["BTF"]) != is_there


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
    assert found["capabilities"].startswith(f"MISSING capabilities: missing: CAP_{name.upper()}; run as root, or grant")
    assert found["capabilities"].endswith("AmbientCapabilities=CAP_NET_ADMIN CAP_PERFMON CAP_BPF")


@root
def test_a_capability_that_one_hook_needs(tmp_path):
    _, found = check(tmp_path, before=without("net_admin"))

    assert found["capabilities"].startswith(
        "no      capabilities: missing: CAP_NET_ADMIN, and the hook cgroup_skb needs"
    )


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
        assert found["lockdown"].startswith("MISSING lockdown: /sys/kernel/security/lockdown is at confidentiality")
        assert "lockdown=integrity" in found["lockdown"]


@root
def test_cgroup_v2_not_mounted(mounts, tmp_path):
    script = "for at in $(awk '$3 == \"cgroup2\" { print $2 }' /proc/self/mounts); do umount -l $at; done"
    code, found = check(tmp_path, config='capture.hooks = ["cgroup_skb"]', before=inside(script))

    assert found["cgroup v2"].startswith("no      cgroup v2: not mounted")
    assert "mount -t cgroup2 none" in found["cgroup v2"]
    assert code == 69
    assert found["transmit"].startswith("MISSING transmit: no hook is possible")
    assert (
        found["transmit by cgroup_skb"] == "no      transmit by cgroup_skb: egress: no cgroup v2 file system is mounted"
    )


BCC = Path("/usr/lib/python3/dist-packages/bcc")


@root
@pytest.mark.skipif(not BCC.is_dir(), reason=f"NO BCC in {BCC}")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "MISSING bcc: bcc is missing: install the package python3-bpfcc"),
        ('__version__ = "0.18.0"', "MISSING bcc: 0.18.0 of "),
        ("import no_such_library", "MISSING bcc: "),
    ],
)
def test_bcc_missing_too_old_or_broken(mounts, tmp_path, content, says):
    """In the place of the distribution's lies another, or none."""
    other = tmp_path / "bcc"
    other.mkdir()
    if content is not None:
        (other / "__init__.py").write_text(content)
        (other / "libbcc.py").touch()
    code, found = check(tmp_path, before=inside(f"mount --bind {other} {BCC}"))

    assert code == 69
    assert found["bcc"].startswith(says)
    if content is not None:
        assert ("is too old, 0.26 is wanted" in found["bcc"]) == ("0.18.0" in content)
        assert ("No module named 'no_such_library'" in found["bcc"]) == ("import" in content)


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
        ('kafka.settings = { "acks" = 1 }', "kafka.settings", "acks must be all"),
        ('[[rules]]\nport = ["99-1"]', "rules", "99-1"),
    ],
)
def test_settings_that_cannot_be(tmp_path, config, subject, says):
    code, found = check(tmp_path, config=config)

    assert code == 78
    assert found[subject].startswith(f"MISSING {subject}: ")
    assert says in found[subject]


def test_a_state_folder_that_is_none(tmp_path):
    (tmp_path / "state").touch()
    code, found = check(tmp_path)

    assert code == 78
    assert found["state_dir"] == (
        f"MISSING state_dir: {tmp_path}/state is no folder: remove it, or set state_dir to another"
    )


@root
def test_folders_of_another_user(tmp_path):
    for name in (tmp_path, *tmp_path.parents[:2]):
        name.chmod(0o755)
    code, found = check(tmp_path, before=as_nobody())
    assert code == 78
    assert found["state_dir"] == (
        f"MISSING state_dir: {tmp_path}/state cannot be written by user 65534: "
        f"install -d -m 0700 -o 65534 {tmp_path}/state"
    )

    (tmp_path / "state/spool").mkdir(parents=True)
    os.chown(tmp_path / "state", 65534, 65534)
    code, found = check(tmp_path, before=as_nobody())
    assert code == 78
    assert found["state_dir"].startswith("ok ")
    assert found["state_dir/spool"] == (
        f"MISSING state_dir/spool: {tmp_path}/state/spool cannot be written by user 65534: "
        f"install -d -m 0700 -o 65534 {tmp_path}/state/spool"
    )


@root
def test_a_read_only_disk(mounts, tmp_path):
    (tmp_path / "state").mkdir()
    code, found = check(tmp_path, before=inside(f"mount -t tmpfs -o ro none {tmp_path}/state"))

    assert code == 78
    assert found["state_dir"].startswith(f"MISSING state_dir: {tmp_path}/state is read-only: mount -o remount,rw")


@root
def test_a_disk_too_small_for_the_spool(mounts, tmp_path):
    (tmp_path / "state").mkdir()
    code, found = check(tmp_path, before=inside(f"mount -t tmpfs -o size=64m none {tmp_path}/state"))

    assert code == 0
    assert found["spool"].startswith(
        f"WARNING spool: {tmp_path}/state has room for 64 MiB, and the spool may take 1408"
    )
    assert "lower spool.transmit_bytes" in found["spool"]


@root
def test_pins_that_are_not_in_a_bpffs(tmp_path):
    code, found = check(tmp_path, config=f'capture.pin = "{tmp_path}/pins"')

    assert code == 78
    assert found["capture.pin"] == (
        f"MISSING capture.pin: {tmp_path}/pins is not in a bpffs; mount one: mount -t bpf bpf /sys/fs/bpf"
    )


def test_another_producer(tmp_path):
    """As far as others see it: it holds the lock, and has said who it is."""
    with StateFolder(tmp_path / "state") as state:
        state.publish({})
        code, found = check(tmp_path)

    assert code >= 75
    assert found["producer"] == (
        f"MISSING producer: another runs with state_dir {tmp_path}/state: pid {os.getpid()}; "
        "`rebpf status` says how it fares"
    )
    assert "producer" not in check(tmp_path)[1]


def test_one_replica_where_there_could_be_more() -> None:
    facts = TopicFacts(6, 1, may_write=True, settings={"min.insync.replicas": "1"})

    alone, of_three = (list(_topic(Topic("t"), facts, brokers)) for brokers in (1, 3))
    assert [str(finding) for finding in alone] == ["ok      topic t: 6 partitions"]
    (warning, _) = of_three
    assert warning.warns
    assert warning.text.startswith("one replica on 3 brokers: with its broker go its events; ")
    assert (warning.exit_code, warning.subject) == (0, "topic t")


def test_no_server_is_asked_where_that_is_wanted(tmp_path):
    _, found = check(tmp_path, "--local", "--brokers", "127.0.0.1:1", "--registry", "http://127.0.0.1:1")

    assert not {"Kafka", "registry"} & found.keys()
