"""The settings in force. A reload changes some of them, and cgroups that come and go change the rules."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from producer.agent.supervise import Pace
from producer.config import effective
from producer.config.load import Config
from producer.errors import RebpfError
from producer.host.output import set_log_level
from producer.host.signals import Flag
from producer.kernel.capture import Capture
from producer.rules.resolve import Ruleset, follow, resolve

logger = logging.getLogger(__name__)

_LOOK_INTERVAL_S = 2.0


class InForce:
    """Keeps the settings and the kernel's rules up to date. `read` reads the configuration.

    `version` counts changes of the rules. `apply` is called with the new configuration after each reload. The result of
    `files` differs once a file of the configuration has changed.
    """

    def __init__(
        self,
        hooks: Capture,
        config: Config,
        ruleset: Ruleset,
        read: Callable[[], Config],
        root: Path | None,
        pace: Pace | None = None,
        files: Callable[[], object] = lambda: None,
    ) -> None:
        self._pace = pace or Pace()
        self._hooks = hooks
        self._ruleset = ruleset
        self._read = read
        self._root = root
        self._look_at = time.monotonic() + _LOOK_INTERVAL_S
        self._files, self._files_read, self._files_at = files, files(), 0.0
        self.apply: Callable[[Config], None] = lambda config: None
        self.version = 1
        self.restart_needed: tuple[str, ...] = ()
        """Settings that have changed in the files and need a restart."""
        self.refusal = ""
        """Why the last reload was refused; empty if it succeeded."""
        self.reloads = 0
        """Reloads so far, including refused ones."""
        self.began_ns = 0
        """When the last one began, by the monotonic clock: it has seen all files that were written before."""
        self._set(config)

    def follow(self, asked: Flag) -> None:
        """Reload if `asked` is set, and clear it, or if files have changed. The pace limits how often."""
        if self.config.reload_when_changed and self._have_files_changed():
            asked.set()
        if asked.is_set() and self._pace.is_due():
            asked.clear()
            self._pace.run(self.reload)

    def _have_files_changed(self) -> bool:
        """Every 2 s, look whether a file has changed since the last reload."""
        if time.monotonic() < self._files_at:
            return False
        self._files_at = time.monotonic() + _LOOK_INTERVAL_S
        return self._files() != self._files_read

    def reload(self) -> None:
        """Apply what a reload can change. An invalid configuration is logged and changes nothing."""
        began_ns = time.monotonic_ns()
        try:
            self._files_read = self._files()
            read = self._read()
            config = effective.in_force(self.config, read)
            self._put(config, resolve(config, self._root))
            self.restart_needed = effective.restart_needed(config, read)
            self.apply(config)
        except Exception as error:
            is_defect = not isinstance(error, RebpfError | OSError | ValueError | LookupError)
            self._done(began_ns, str(error) or type(error).__name__)
            logger.error("reload refused: %s; version=%d stays in force", error, self.version, exc_info=is_defect)
            return
        self._done(began_ns, "")
        logger.info("reloaded rules=%d version=%d", len(config.rules), self.version)
        if self.restart_needed:
            logger.warning("changed settings need a restart: %s", ", ".join(self.restart_needed))

    def _done(self, began_ns: int, refusal: str) -> None:
        self.reloads, self.began_ns, self.refusal = self.reloads + 1, began_ns, refusal

    def look(self) -> None:
        """Every 2 s, look for cgroups and units that the rules name and that have appeared or been replaced."""
        if not self._by_cgroup or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK_INTERVAL_S
        ruleset = follow(self._ruleset, self.config, self._root)
        if ruleset != self._ruleset:
            self._put(self.config, ruleset)
            logger.info("rules updated: cgroups changed version=%d", self.version)

    def _put(self, config: Config, ruleset: Ruleset) -> None:
        self.version = self._hooks.put_rules(ruleset.tables())
        self._ruleset = ruleset
        self._set(config)

    def _set(self, config: Config) -> None:
        self.config = config
        self.digest = effective.digest(config)
        self._by_cgroup = any(rule.cgroup or rule.unit for rule in config.rules)
        set_log_level(config.log_level)
