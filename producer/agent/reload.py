"""The settings in force: a reload changes some of them, and the rules follow what they name, such as cgroups."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from producer.agent.supervise import Pace
from producer.config import effective
from producer.config.load import Config
from producer.config.sources import shown
from producer.errors import RebpfError
from producer.host.output import set_log_level
from producer.host.signals import Flag
from producer.kernel.rule_maps import RuleMaps
from producer.rules.resolve import Ruleset, follow, names_change, resolve
from producer.rules.tables import Tables
from producer.rules.users import Users
from producer.spool.disk import PASSING

logger = logging.getLogger(__name__)

_INTERVAL_S = 2.0
_STEP_S = 0.05
_LONG_S = 30.0
_MOST_ABSENT = 8
"""Names in the reasons."""
LONG = "reload: the files of the configuration have been read for long: does the disk of one of them hang?"


class ConfigReader:
    """Reads the configuration by `read`, now and for each reload.

    The result of `files` differs once one of its files has changed. `located` adds the file and line to a ConfigError.
    """

    def __init__(
        self,
        read: Callable[[], Config],
        files: Callable[[], object] = lambda: None,
        located: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._read = read
        self._files = files
        self._files_read: object = None
        self.located = located

    def read(self) -> Config:
        """Read the files."""
        self._files_read = self._files()  # before they are read: a later change means a reload
        return self._read()

    def have_changed(self) -> bool:
        """Whether the files have changed since they were last read."""
        return self._files() != self._files_read


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A configuration that was read, and what a reload applies of it."""

    read: Config
    config: Config
    ruleset: Ruleset
    tables: Tables


@dataclass(frozen=True, slots=True)
class _Found:
    """The rules with what they name as it exists now, and those from which they were made."""

    before: Ruleset
    ruleset: Ruleset
    tables: Tables


class InForce:
    """Keeps the settings and the kernel's rules up to date. `reader` is used in a thread.

    `version` is that of the kernel's rules. `apply` is called with the new configuration after each reload.
    """

    def __init__(
        self,
        rules: RuleMaps,
        config: Config,
        ruleset: Ruleset,
        reader: ConfigReader,
        root: Path | None,
        pace: Pace | None = None,
    ) -> None:
        self._pace = pace or Pace()
        self._rules = rules
        self._ruleset = ruleset
        self._reader = reader
        self._root = root
        self._lookup_at = time.monotonic() + _INTERVAL_S
        self._lookup_pace = Pace()
        self._lookup: threading.Thread | None = None
        """Looks up what the rules name."""
        self._users = Users()
        self._found: _Found | None = None
        """Its result, if anything has changed."""
        self._lookup_error: Exception | None = None
        """Why the last lookup failed."""
        self._files_at = 0.0
        self.apply: Callable[[Config], None] = lambda config: None
        self.version = rules.version
        self.restart_needed: tuple[str, ...] = ()
        """Settings that have changed in the files and need a restart."""
        self.refusal = ""
        """Why the last reload was refused; empty if it succeeded."""
        self.reloads = 0
        """Reloads so far, including refused ones."""
        self._thread: threading.Thread | None = None
        """Prepares a reload."""
        self._prepared: _Prepared | Exception | None = None
        """Its result, until it is in force."""
        self._filling: Iterator[None] | None = None
        """The rest of the writes into the kernel's tables."""
        self._started_ns = 0
        self.began_ns = 0
        """When the last one began, by the monotonic clock: it has seen all files that were written before."""
        self._set(config)

    @property
    def busy(self) -> bool:
        """Whether a thread prepares a reload or looks up names, or its result is not in force yet."""
        return self._thread is not None or self._prepared is not None or self._lookup is not None

    @property
    def reasons(self) -> list[str]:
        """What is wrong with the last reload, with the one that a thread prepares, and with the rules in force."""
        hangs = self._thread is not None and time.monotonic_ns() - self._started_ns > _LONG_S * 1e9
        refused = [f"reload refused: {self.refusal}"] if self.refusal else []
        return [*refused, *([LONG] if hangs else []), *self._ruleset.absent[:_MOST_ABSENT]]

    def follow(self, asked: Flag) -> None:
        """Reload if `asked` is set, and clear it, or if files have changed. The pace limits how often.

        Files and rules may be large, and their disk may hang, so a thread checks, reads and compiles them. Later
        calls put them in force, each for a short time.
        """
        if self._thread and not self._thread.is_alive():
            self._thread = None
        if self._thread:
            return
        if self._prepared and self._proceed(self._prepared):
            asked.set()
        if self._prepared:
            return
        if not self._pace.is_due():
            return
        if asked.is_set():
            asked.clear()  # before the files are read: a signal meanwhile asks for another reload
            try:
                self._start(self._prepare)
            except RuntimeError:  # no more threads for now
                asked.set()
                raise
        elif self.config.reload_when_changed and time.monotonic() >= self._files_at:
            self._files_at = time.monotonic() + _INTERVAL_S
            self._start(self._prepare_if_changed)

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="reload", daemon=True)
        self._started_ns = time.monotonic_ns()
        thread.start()
        self._thread = thread

    def _prepare_if_changed(self) -> None:
        """Prepare a reload if a file has changed since the last one."""
        if self._reader.have_changed():
            self._prepare()

    def _prepare(self) -> None:
        """Read, resolve and compile the configuration."""
        self._pace.run(self._read_and_compile)

    def _read_and_compile(self) -> None:
        try:
            read = self._reader.read()
            config = effective.in_force(self.config, read)
            with self._reader.located():
                ruleset = resolve(config, self._root)
                tables = ruleset.tables()
            self._prepared = _Prepared(read, config, ruleset, tables)
        except Exception as error:
            self._prepared = error

    def _proceed(self, prepared: _Prepared | Exception) -> bool:
        """Put a step of it in force; return whether to reload again. An invalid configuration changes nothing."""
        try:
            if isinstance(prepared, Exception):
                raise prepared
            self._filling = self._filling or self._rules.put_in_steps(prepared.tables)
            end_s = time.monotonic() + _STEP_S
            for _ in self._filling:
                if time.monotonic() >= end_s:
                    return False
            self._put_in_force(prepared)
        except Exception as error:
            self._prepared = self._filling = None
            return self._refuse(error)
        self._prepared = self._filling = None
        return False

    def _put_in_force(self, prepared: _Prepared) -> None:
        """Apply the other settings: the kernel's tables are filled."""
        self.version = self._rules.version
        self._ruleset = prepared.ruleset
        self._set(prepared.config)
        self.restart_needed = effective.restart_needed(prepared.config, prepared.read)
        self.apply(prepared.config)
        self._done("")
        logger.info("reloaded rules=%d version=%d", len(self.config.rules), self.version)
        if self.restart_needed:
            logger.warning("changed settings need a restart: %s", ", ".join(self.restart_needed))

    def _refuse(self, error: Exception) -> bool:
        """Log and count why nothing changes; return whether a retry may succeed."""
        is_passing = any(isinstance(each, OSError) and each.errno in PASSING for each in (error, error.__cause__))
        reason = shown(str(error)) or type(error).__name__
        if is_passing and reason == self.refusal:
            self.began_ns = self._started_ns
        else:
            is_defect = not isinstance(error, RebpfError | OSError | ValueError | LookupError)
            self._done(reason)
            trace = error if is_defect else None
            logger.error("reload refused: %s; version=%d stays in force", reason, self.version, exc_info=trace)
        return is_passing

    def _done(self, refusal: str) -> None:
        self.reloads, self.began_ns, self.refusal = self.reloads + 1, self._started_ns, refusal

    def follow_names(self) -> None:
        """Every 2 s, look up what the rules name: it may have appeared, or been replaced.

        There may be many rules and cgroups, so a thread does it. A later call puts the rules in force.
        """
        if not self._prepared and not (self._lookup and self._lookup.is_alive()):
            self._next_lookup()
        if self._lookup_error:  # at each call, until a lookup succeeds
            raise self._lookup_error

    def _next_lookup(self) -> None:
        """Put what was found in force, and start the next lookup if it is due."""
        found, self._lookup, self._found = self._found, None, None
        if found and found.before is self._ruleset:  # otherwise, a reload came between
            self.version = self._rules.put(found.tables)
            self._ruleset = found.ruleset
            logger.info("rules updated: what they name has changed version=%d", self.version)
        if self._by_name and time.monotonic() >= self._lookup_at and self._lookup_pace.is_due():
            self._lookup_at = time.monotonic() + _INTERVAL_S
            find = partial(self._lookup_pace.run, partial(self._find, self._ruleset, self.config))
            thread = threading.Thread(target=find, name="names", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads for now
                self._lookup_error = error
            else:
                self._lookup = thread

    def _find(self, before: Ruleset, config: Config) -> None:
        try:
            ruleset = follow(before, config, self._root, self._users)
            if ruleset != before:
                self._found = _Found(before, ruleset, ruleset.tables())
            self._lookup_error = None
        except Exception as error:
            self._lookup_error = error

    def _set(self, config: Config) -> None:
        self.config = config
        for text in self._ruleset.absent[:_MOST_ABSENT]:
            logger.warning("rules: %s", text)
        self.digest = effective.digest(config)
        self._by_name, self._lookup_error = names_change(config) or bool(self._ruleset.absent), None
        set_log_level(config.log_level)
