"""Resolves the names in the configuration's rules on this host: users, namespaces, interfaces, cgroups, units.

The form of the rules was checked before (producer.config.validate).
"""

import dataclasses
import errno
import fnmatch
import functools
import ipaddress
import itertools
import os
import pwd
import socket
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from producer.config.load import Config, RuleConfig
from producer.errors import ConfigError
from producer.host.exhausted import exhausted
from producer.host.state_file import at_most
from producer.rules.tables import (
    MOST_CGROUP_LEVELS,
    MOST_PREFIXES,
    Action,
    Network,
    PortRange,
    Rule,
    Tables,
    only,
    tables,
)
from producer.rules.users import Users

V = TypeVar("V")
R = TypeVar("R")

NETNS = Path("/run/netns")
_ABSENT = 0
"""The id of a cgroup that does not exist. No cgroup has id 0, so the condition matches nothing."""
_NEVER = 1 << 32
"""In place of the number of a namespace, user or interface that does not exist. No such number has over 32 bits."""
_NOWHERE = ipaddress.IPv6Network("::/128")
"""The network of an empty list. No segment has this address, so the condition matches nothing."""
_MOST_LIST_BYTES = 16 << 20
"""Maximum size of an address list: 130,000 lines of 128 bytes."""


@dataclass(frozen=True, slots=True)
class Ruleset:
    """Resolved rules. `cgroups_above` has the ancestors of each named cgroup.

    `absent` says which namespaces, users and interfaces do not exist.
    """

    rules: Sequence[Rule]
    default: Action
    cgroups_above: Mapping[int, Sequence[int]]
    absent: tuple[str, ...] = ()

    def tables(self) -> Tables:
        """Compile the rules. ConfigError if the kernel's tables cannot hold them."""
        return tables(self.rules, self.default, self.cgroups_above)


def resolve(config: Config, cgroup_root: Path | None) -> Ruleset:
    """Resolve the rules of a configuration on this host.

    A cgroup, unit, namespace, user or interface that does not exist now matches nothing: at a boot, it may come later.
    ConfigError names the rule with an invalid condition.
    """
    capture = config.capture
    if not config.rules:
        rules, default = only(capture.addresses, capture.ports)
        return Ruleset(rules, default if rules else _action(capture.default, None, None, None), {})
    if capture.addresses or capture.ports:
        raise ConfigError("rules and a filter by addresses or ports cannot be combined: turn the filter into a rule")
    cgroups = _Cgroups(cgroup_root)
    absent: list[str] = []
    rules = tuple(_rule(number, rule, cgroups, absent) for number, rule in enumerate(config.rules, 1))
    return Ruleset(rules, _action(capture.default, None, None, None), _above(rules, cgroups), tuple(absent))


def resolve_offline(config: Config) -> Ruleset:
    """Resolve the rules without this host: each name gets an id of its own, and files of addresses are not read."""
    ids: defaultdict[str, int] = defaultdict(itertools.count(1).__next__)
    rules = tuple(_without_names(rule, ids) for rule in config.rules)
    return resolve(dataclasses.replace(config, rules=rules), None)


def _without_names(rule: RuleConfig, ids: Mapping[str, int]) -> RuleConfig:
    def numbers(values: Iterable[int | str]) -> tuple[int | str, ...]:
        return tuple(ids[value] if isinstance(value, str) else value for value in values)

    def networks(values: Iterable[str]) -> tuple[str, ...]:
        return tuple(str(_NOWHERE) if value.startswith("@") else value for value in values)

    return dataclasses.replace(
        rule,
        address=networks(rule.address),
        local_address=networks(rule.local_address),
        remote_address=networks(rule.remote_address),
        netns=numbers(rule.netns),
        uid=numbers(rule.uid),
        interface=numbers(rule.interface),
    )


def follow(ruleset: Ruleset, config: Config, cgroup_root: Path | None, users: Users) -> Ruleset:
    """Return `ruleset`, which was resolved from `config`, with the cgroups, namespaces and interfaces that exist now.

    Of the users, only those that did not exist are looked for; files are only read at a reload.
    """
    cgroups = _Cgroups(cgroup_root)
    absent: list[str] = []
    missing: list[int | str] = []
    rules = []
    for number, (rule, source) in enumerate(zip(ruleset.rules, config.rules, strict=True), 1):
        where = _where(number, source)
        netns = _netns(where, source.netns, absent)
        named = [name if uid == _NEVER else uid for name, uid in zip(source.uid, rule.uid, strict=True)]
        uid = _users(where, named, users.take, absent)
        interface = _interfaces(where, source.interface, absent)
        followed = dataclasses.replace(rule, cgroup=_cgroups(source, cgroups), netns=netns, uid=uid)
        rules.append(dataclasses.replace(followed, interface=interface))
        missing += [name for name, uid in zip(named, uid, strict=True) if uid == _NEVER]
    users.look_up(list(map(str, missing)))
    return Ruleset(tuple(rules), ruleset.default, _above(rules, cgroups), tuple(absent))


def names_change(config: Config) -> bool:
    """Whether rules name what can be replaced while they are in force: cgroups, units, namespaces or interfaces."""
    names = ((*rule.cgroup, *rule.unit, *rule.netns, *rule.interface) for rule in config.rules)
    return any(isinstance(each, str) for each in itertools.chain.from_iterable(names))


def _cgroups(rule: RuleConfig, cgroups: "_Cgroups") -> tuple[int, ...]:
    return (*_each(rule.cgroup, cgroups.at), *_each(rule.unit, cgroups.named))


def _above(rules: Iterable[Rule], cgroups: "_Cgroups") -> dict[int, Sequence[int]]:
    return {cgroup: cgroups.above(cgroup) for rule in rules for cgroup in rule.cgroup}


def _where(number: int, rule: RuleConfig) -> str:
    return f"rule {number} {rule.name}".rstrip()


def _rule(number: int, rule: RuleConfig, cgroups: "_Cgroups", absent: list[str]) -> Rule:
    name = rule.name or f"rule {number}"
    where = _where(number, rule)
    keep = _action(rule.action, rule.transmit, rule.retransmit, rule.flow)
    by_event = rule.sample_by == "event"
    try:
        return Rule(
            name,
            Action(keep.transmit, keep.retransmit, keep.flow, rule.sample, by_event, rule.sample_retransmits),
            address=_each(rule.address, _networks),
            local_address=_each(rule.local_address, _networks),
            remote_address=_each(rule.remote_address, _networks),
            port=_each(rule.port, _ports),
            local_port=_each(rule.local_port, _ports),
            remote_port=_each(rule.remote_port, _ports),
            netns=_netns(where, rule.netns, absent),
            cgroup=_cgroups(rule, cgroups),
            uid=_users(where, rule.uid, _user_number, absent),
            interface=_interfaces(where, rule.interface, absent),
            state=rule.state,
        )
    except OSError as error:
        if exhausted(error):  # says nothing about the rule
            raise
        subject = f"{error.filename}: " if error.filename else ""
        raise ConfigError(f"{where}: {subject}{error.strerror or error}") from error
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _each(values: Iterable[V], parse: Callable[[V], Iterable[R]]) -> tuple[R, ...]:
    return tuple(found for value in values for found in parse(value))


def _action(every: str, *by_stream: str | None) -> Action:
    """Return the action of a rule; `by_stream` has the words for transmits, retransmits and flows, in that order."""
    return Action(*((word or every) == "keep" for word in by_stream))


def _networks(text: str) -> Iterable[Network]:
    """Parse an address, a network, or `@FILE` with one of these per line."""
    if not text.startswith("@"):
        return [ipaddress.ip_network(text)]
    path, networks = Path(text[1:]), []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if network := line.partition("#")[0].strip():
            try:
                networks.append(ipaddress.ip_network(network))
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from error
    return networks or [_NOWHERE]


def _read(path: Path) -> str:
    """Return the text of a list. ValueError if it is not a regular file, or too long."""
    # Without O_NONBLOCK, opening a pipe blocks until it has a writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file: expected a list with one address or network per line")
        content = at_most(file, _MOST_LIST_BYTES + 1)
    if len(content) > _MOST_LIST_BYTES:
        raise ValueError(
            f"{path} is longer than {_MOST_LIST_BYTES >> 20} MiB: at most {MOST_PREFIXES:,} networks in all rules"
        )
    try:
        return content.decode("utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _ports(value: int | str) -> Iterable[PortRange]:
    """Parse 443 or "8000-8999"."""
    low, _, high = str(value).partition("-")
    return [(int(low), int(high or low))]


def _netns(where: str, values: Iterable[int | str], absent: list[str]) -> tuple[int, ...]:
    """Return inode numbers, also of named namespaces (`ip netns`)."""
    return _numbers(f"{where}: netns", values, _netns_number, absent)


def _interfaces(where: str, values: Iterable[int | str], absent: list[str]) -> tuple[int, ...]:
    """Return indexes, also of named interfaces in this process's network namespace."""
    return _numbers(f"{where}: interface", values, _interface_number, absent)


def _numbers(
    where: str, values: Iterable[int | str], number: Callable[[str], int], absent: list[str]
) -> tuple[int, ...]:
    """Return the numbers of names, and add those that do not exist to `absent`."""
    found = []
    for value in values:
        try:
            found.append(value if isinstance(value, int) else number(value))
        except OSError as error:
            if exhausted(error):
                raise
            absent.append(f"{where} {value}: {error.strerror or error}: it matches nothing until it exists")
            found.append(_NEVER)
    return tuple(found)


def _interface_number(name: str) -> int:
    with socket.socket(socket.AF_UNIX):  # it needs one, and without a free descriptor it finds no interface
        pass
    return socket.if_nametoindex(name)


def _netns_number(name: str) -> int:
    status = (NETNS / name).stat()
    if status.st_dev != os.stat("/proc/self/ns/net").st_dev:  # left over, or mounted where this process does not see it
        raise FileNotFoundError(errno.ENOENT, "no network namespace is mounted there")
    return status.st_ino


def _users(
    where: str, values: Iterable[int | str], number: Callable[[str], int | None], absent: list[str]
) -> tuple[int, ...]:
    """Return user ids, also of names. A name that no user has may be known later (producer.rules.users)."""

    def found(name: str) -> int:
        if (uid := number(name)) is None:
            raise FileNotFoundError(errno.ENOENT, "no user has this name")
        return uid

    return _numbers(f"{where}: uid", values, found, absent)


def _user_number(name: str) -> int | None:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


class _Cgroups:
    """Ids of cgroups by path below the root, and of their ancestors."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._ids: dict[Path, int] = {}
        self._folders: dict[int, Path] = {}

    def at(self, path: str) -> Iterable[int]:
        """Return the id of the cgroup at a path below the root."""
        parts = [part for part in path.split("/") if part]
        if len(parts) >= MOST_CGROUP_LEVELS:
            raise ValueError(f"cgroup {path!r} is {len(parts)} levels below the root: at most {MOST_CGROUP_LEVELS - 1}")
        return [self._id(self._root.joinpath(*parts)) if self._root else _ABSENT]

    def named(self, unit: str) -> Iterable[int]:
        """Return the ids of the cgroups of systemd units by name, which may have wildcards.

        Units are in the root or in slices. Folders in a unit, or in a slice delegated to a user, are not searched:
        unprivileged users may have created them under any name.
        """
        is_pattern = any(character in unit for character in "*?[")
        names = fnmatch.filter(self._units, unit) if is_pattern else [unit]
        return sorted({self._id(folder) for name in names for folder in self._units.get(name, ())}) or [_ABSENT]

    @functools.cached_property
    def _units(self) -> Mapping[str, Sequence[Path]]:
        """The folders that may be units, by name. One walk finds them for all rules."""
        found: defaultdict[str, list[Path]] = defaultdict(list)
        to_search = [self._root] if self._root else []
        while to_search:
            for folder in _folders(to_search.pop()):
                found[folder.name].append(folder)
                if folder.name.endswith(".slice") and self._is_systems(folder):
                    to_search.append(folder)
        return found

    def above(self, cgroup: int) -> Sequence[int]:
        """Return the ids of the ancestors of a cgroup that was found."""
        root, folder = self._root, self._folders.get(cgroup)
        if folder is None or root is None:
            return ()
        between = itertools.takewhile(lambda parent: parent != root.parent, folder.parents)
        return [self._ids[parent] if parent in self._ids else self._id(parent) for parent in between]

    def _is_systems(self, folder: Path) -> bool:
        """Whether only the owner of the whole hierarchy can create folders there."""
        assert self._root is not None
        try:
            status = os.stat(folder)
            return status.st_uid == os.stat(self._root).st_uid and not status.st_mode & 0o022
        except OSError:
            return False

    def _id(self, folder: Path) -> int:
        try:
            self._ids[folder] = os.stat(folder).st_ino
        except OSError:
            return _ABSENT
        self._folders[self._ids[folder]] = folder
        return self._ids[folder]


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder; none if it no longer exists."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        if exhausted(error):
            raise
        return []
