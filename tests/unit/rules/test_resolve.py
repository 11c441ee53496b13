"""Names of this host become numbers in rules; invalid ones are rejected with the rule's name."""

import dataclasses
import ipaddress
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from producer.config.load import Capture, Config, RuleConfig
from producer.errors import ConfigError
from producer.rules.resolve import Ruleset, follow, resolve
from producer.rules.tables import Action, Segment
from producer.rules.users import Users
from tests.support.procfs import open_files, without_descriptors
from tests.support.rules import decide, first_match


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders like a cgroup v2 hierarchy."""
    for path in ("system.slice/nginx.service/worker", "user.slice/nginx.service", "other"):
        (tmp_path / path).mkdir(parents=True)
    return tmp_path


def resolved(root: Path | None, *rules: RuleConfig, default: str = "keep") -> Ruleset:
    return resolve(Config(capture=Capture(default=default), rules=rules), root)


def inode(path: Path) -> int:
    return os.stat(path).st_ino


def test_names_become_numbers(root: Path) -> None:
    (rule,) = resolved(
        root,
        RuleConfig(
            address=("10.0.0.0/8", "2001:db8::1"),
            local_port=(443, "8000-8999"),
            uid=("root", 7),
            interface=("lo", 9),
            netns=(4026531840,),
            cgroup=("/system.slice",),
        ),
    ).rules
    assert rule.address == (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("2001:db8::1/128"))
    assert rule.local_port == ((443, 443), (8000, 8999))
    assert (rule.uid, rule.interface, rule.netns) == ((0, 7), (1, 9), (4026531840,))
    assert rule.cgroup == (inode(root / "system.slice"),)


def test_addresses_come_from_a_file(tmp_path: Path) -> None:
    peers = tmp_path / "peers"
    peers.write_text("# ours\n10.1.0.0/16\n\n2001:db8::/32  # theirs\n")
    (rule,) = resolved(None, RuleConfig(remote_address=(f"@{peers}",))).rules
    assert rule.remote_address == (ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("2001:db8::/32"))


def test_a_unit_is_every_cgroup_of_its_name_with_those_above_it(root: Path) -> None:
    found = resolved(root, RuleConfig(unit=("nginx.service",)))
    one, other = root / "system.slice/nginx.service", root / "user.slice/nginx.service"
    assert set(found.rules[0].cgroup) == {inode(one), inode(other)}
    assert found.cgroups_above[inode(one)] == [inode(root / "system.slice"), inode(root)]


def test_a_missing_cgroup_matches_nothing(root: Path) -> None:
    segment = Segment(ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("10.0.0.2"), 1, 2, cgroups=(5,))
    for absent in (RuleConfig(cgroup=("/gone",)), RuleConfig(unit=("gone.service",))):
        for place in (root, None):
            assert first_match(resolved(place, absent).rules, segment) is None


def test_actions_are_by_stream() -> None:
    found = resolved(
        None, RuleConfig(action="drop", retransmit="keep"), RuleConfig(sample=5, flow="drop"), default="drop"
    )
    assert found.rules[0].action == Action(transmit=False, retransmit=True, flow=False)
    assert found.rules[1].action == Action(flow=False, sample_rate=5)
    assert found.default == Action(transmit=False, retransmit=False, flow=False)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (RuleConfig(address=("10.0.0.1/8",)), "rule 1: 10.0.0.1/8 has host bits set"),
        (RuleConfig(address=("@/no/such/file",)), "rule 1: /no/such/file: No such file or directory"),
    ],
)
def test_invalid_conditions_are_rejected(rule: RuleConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(None, rule)


def test_a_namespace_by_name_is_a_mounted_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that a namespace was mounted on has a number too, which no connection has."""
    monkeypatch.setattr("producer.rules.resolve.NETNS", root)
    (root / "own").symlink_to("/proc/self/ns/net")
    (root / "left").touch()
    (rule,) = resolved(root, RuleConfig(netns=("own",))).rules
    assert rule.netns == (inode(Path("/proc/self/ns/net")),)
    left = resolved(root, RuleConfig(netns=("left",)))
    assert left.absent == (
        "rule 1: netns left: no network namespace is mounted there: it matches nothing until it exists",
    )


def test_an_interface_and_a_namespace_that_do_not_exist_yet_match_nothing_until_they_do(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a boot, a tunnel or a namespace comes later than the producer, which must start nevertheless."""
    monkeypatch.setattr("producer.rules.resolve.NETNS", root)
    config = Config(rules=(RuleConfig(name="vpn", interface=("tun77", 9)), RuleConfig(netns=("app",))))
    ruleset = resolve(config, root)
    assert [text.partition(":")[0] for text in ruleset.absent] == ["rule 1 vpn", "rule 2"]
    nowhere = ipaddress.ip_address("10.0.0.1")
    segment = Segment(nowhere, nowhere, 1, 2, netns=0, interface=0)
    tables = ruleset.tables()
    assert (first_match(ruleset.rules, segment), decide(tables, segment)) == (None, 2)
    assert decide(tables, dataclasses.replace(segment, interface=9)) == 0

    (root / "app").symlink_to("/proc/self/ns/net")
    monkeypatch.setattr("socket.if_nametoindex", lambda name: 12)
    followed = follow(ruleset, config, root, Users())
    assert not followed.absent
    assert [rule.interface for rule in followed.rules] == [(12, 9), ()]
    assert followed.rules[1].netns == (inode(Path("/proc/self/ns/net")),)


def test_an_interface_and_a_namespace_that_are_created_again_are_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tunnel that reconnects, and a namespace of a container that restarts, have other numbers than before."""
    monkeypatch.setattr("producer.rules.resolve.NETNS", root)
    monkeypatch.setattr("socket.if_nametoindex", lambda name: 12)
    (root / "app").symlink_to("/proc/self/ns/net")
    config = Config(rules=(RuleConfig(interface=("tun77", 9)), RuleConfig(netns=("app",))))
    before = resolve(config, root)
    assert follow(before, config, root, Users()) == before
    monkeypatch.setattr("socket.if_nametoindex", lambda name: 13)
    (root / "app").unlink()
    after = follow(before, config, root, Users())
    assert after.rules[0].interface == (13, 9)
    assert after.rules[1].netns != before.rules[1].netns
    assert [text.partition(": ")[2].partition(":")[0] for text in after.absent] == ["netns app"]


def test_a_user_that_does_not_exist_yet_matches_nothing_until_it_does(root: Path) -> None:
    """At a boot, the service that knows it comes later than the producer; DynamicUser= has it while a service runs."""
    config = Config(rules=(RuleConfig(uid=(7, "root", "late"), interface=("lo",)),))
    before = resolve(config, root)
    assert before.absent == ("rule 1: uid late: no user has this name: it matches nothing until it exists",)
    nowhere = ipaddress.ip_address("10.0.0.1")
    segment = Segment(nowhere, nowhere, 1, 2, interface=before.rules[0].interface[0], uid=8)
    assert decide(before.tables(), segment) == 1
    assert decide(before.tables(), dataclasses.replace(segment, uid=7)) == 0

    looks = Looks(late=8)
    assert follow(before, config, root, looks) == before
    assert looks.names == ["late"]
    after = follow(before, config, root, looks)
    assert (after.rules[0].uid, after.absent) == ((7, 0, 8), ())
    assert follow(after, config, root, looks) == after
    assert looks.names == []


class Looks(Users):
    """Finds users by the second time."""

    def __init__(self, **users: int) -> None:
        super().__init__()
        self.names: Sequence[str] = []
        self._users = users

    def take(self, name: str) -> int | None:
        return self._users[name] if name in self.names else None

    def look_up(self, names: Sequence[str]) -> None:
        self.names = names


@pytest.mark.parametrize("rule", [RuleConfig(unit=("nginx.service",)), RuleConfig(interface=("lo",))])
def test_without_a_free_descriptor_nothing_counts_as_gone(root: Path, rule: RuleConfig) -> None:
    """The rules in force would match nothing."""
    config = Config(rules=(rule,))
    before = resolve(config, root)
    with without_descriptors():
        for look in (lambda: follow(before, config, root, Users()), lambda: resolve(config, root)):
            with pytest.raises(OSError, match="Too many open files"):
                look()
    assert follow(before, config, root, Users()) == before


def test_a_filter_and_rules_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="cannot be combined"):
        resolve(Config(capture=Capture(ports=(1,)), rules=(RuleConfig(),)), None)


def test_cgroups_are_followed_and_files_are_not_read_again(root: Path) -> None:
    peers = root / "peers"
    peers.write_text("10.1.0.0/16\n")
    rule = RuleConfig(remote_address=(f"@{peers}",), unit=("late.service",))
    config = Config(rules=(rule,))
    before = resolve(config, root)
    peers.unlink()
    assert follow(before, config, root, Users()) == before
    (root / "system.slice/late.service").mkdir()
    after = follow(before, config, root, Users())
    assert after.rules[0].cgroup == (inode(root / "system.slice/late.service"),)
    assert after.rules[0].remote_address == before.rules[0].remote_address


def test_a_folder_below_a_unit_cannot_take_the_name_of_another(root: Path) -> None:
    (root / "user.slice/user@1000.service/app.slice/sshd.service").mkdir(parents=True)
    assert resolved(root, RuleConfig(unit=("sshd.service",))).rules[0].cgroup == (0,)


def test_a_wrong_line_of_a_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "peers"
    path.write_bytes(b"\xef\xbb\xbf10.1.0.0/16\r\n# partners\r\n10.2.0.300\r\n")
    with pytest.raises(ConfigError, match=rf"rule 1: {path}: line 3: '10\.2\.0\.300' does not appear"):
        resolved(None, RuleConfig(address=(f"@{path}",)))
    path.write_bytes(b"10.1.0.0/16\n\xff")
    with pytest.raises(ConfigError, match=f"rule 1: {path}: 'utf-8' codec"):
        resolved(None, RuleConfig(address=(f"@{path}",)))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
@pytest.mark.parametrize("owner", ["uid", "mode"])
def test_a_slice_that_others_can_make_folders_in_names_no_units(root: Path, owner: str) -> None:
    delegated = root / "user.slice/user-1000.slice"
    (delegated / "sshd.service").mkdir(parents=True)
    assert resolved(root, RuleConfig(unit=("sshd.service",))).rules[0].cgroup == (inode(delegated / "sshd.service"),)
    if owner == "uid":
        os.chown(delegated, 1000, 1000)
    else:
        delegated.chmod(0o777)
    assert resolved(root, RuleConfig(unit=("sshd.service",))).rules[0].cgroup == (0,)
    assert resolved(root, RuleConfig(unit=("user-1000.slice",))).rules[0].cgroup == (inode(delegated),)


def test_a_slice_of_a_users_own_below_his_units_names_no_units(root: Path) -> None:
    (root / "user.slice/user@1000.service/system.slice/sshd.service").mkdir(parents=True)
    (root / "other/system.slice/sshd.service").mkdir(parents=True)
    assert resolved(root, RuleConfig(unit=("sshd.service", "*/sshd.service"))).rules[0].cgroup == (0, 0)


def test_a_cgroup_is_named_by_a_path_that_the_kernel_can_be_asked_for(root: Path) -> None:
    assert resolved(root, RuleConfig(cgroup=("/a" * 31,))).rules[0].cgroup == (0,)
    with pytest.raises(ConfigError, match=r"rule 1: .*32 levels below the root: at most 31"):
        resolved(root, RuleConfig(cgroup=("/a" * 32,)))


@pytest.mark.slow
def test_thousands_of_units_are_resolved_at_once(root: Path) -> None:
    for i in range(3000):
        (root / f"system.slice/job{i}.service").mkdir()
    found = resolved(root, RuleConfig(unit=("job*.service",)))
    assert len(found.cgroups_above) == 3000
    assert all(above == [inode(root / "system.slice"), inode(root)] for above in found.cgroups_above.values())


def test_each_folder_is_read_once_for_all_rules(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, scandir = [], os.scandir
    monkeypatch.setattr("os.scandir", lambda path: read.append(path) or scandir(path))
    units = ("cron.service", "no such.service", "*.service", "?.scope")
    resolve(Config(rules=tuple(RuleConfig(unit=(unit,)) for unit in units)), root)
    assert len(read) == len(set(read)) > 1


def test_a_list_of_addresses_is_a_file_of_bounded_length(tmp_path: Path) -> None:
    long, pipe = tmp_path / "long", tmp_path / "pipe"
    with long.open("wb") as file:
        file.truncate((16 << 20) + 1)
    os.mkfifo(pipe)
    for path, message in (
        (long, "longer than 16 MiB: at most 130,000 networks in all rules"),
        (pipe, "is not a regular file"),
        (Path("/dev/zero"), "is not a regular file"),
        (tmp_path, "rule 1: "),
    ):
        with pytest.raises(ConfigError, match=message):
            resolved(None, RuleConfig(address=(f"@{path}",)))


def test_a_folder_instead_of_a_list_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """A reload every few seconds would use them up."""
    before = Counter(open_files())
    with pytest.raises(ConfigError, match="directory"):
        resolved(None, RuleConfig(address=(f"@{tmp_path}",)))
    assert Counter(open_files()) <= before


def test_a_list_that_is_not_text_is_rejected_with_the_rules_name(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_bytes(b"10.0.0.1\n\xff\n")
    with pytest.raises(ConfigError, match=r"rule 1 r: .*utf-8"):
        resolved(None, RuleConfig(name="r", address=(f"@{path}",)))


def test_an_empty_list_of_addresses_matches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "blocked"
    path.write_text("# nobody today\n")
    found = resolved(None, RuleConfig(action="drop", address=(f"@{path}",)))
    for one, other in (("10.0.0.1", "10.0.0.2"), ("::1", "2001:db8::1")):
        segment = Segment(ipaddress.ip_address(one), ipaddress.ip_address(other), 1, 2)
        assert first_match(found.rules, segment) is None
        assert decide(found.tables(), segment) == 1
