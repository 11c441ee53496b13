"""Settings of all tests, and the tiers, which select the tests of a run. See scripts/test."""

import os
import signal
import time
from collections import Counter

import pytest
from hypothesis import settings

# Under nohup, what the tests start would inherit that SIGHUP is ignored. A handler is not inherited.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)

# Wherever the tests run: local times are UTC, except in tests of other zones, and other users can read new files.
os.environ["TZ"] = "UTC"
time.tzset()
os.umask(0o022)

# Slow machines must not fail tests. The examples are the same each time, except in the tier `all`, which searches.
settings.register_profile("all", deadline=None, derandomize=False)
for tier, examples in (("quick", 10), ("default", 50)):
    settings.register_profile(tier, settings.get_profile("all"), derandomize=True, max_examples=examples)

TIERS = ("quick", "default", "all")
QUICK = ("tests/unit/", "tests/property/")
"""Folders whose tests need neither servers nor a network, except tests marked root, slow or extended."""

left_out = pytest.StashKey[Counter[tuple[str, str]]]()
"""Number of tests per folder that are not in the tier, with the option of scripts/test that runs them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=TIERS, default="default", help="which tests to run (default: %(default)s)")
    parser.addoption("--part", metavar="K/N", help="every N-th test only, from the K-th; for processes side by side")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile(config.getoption("tier"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests outside the part or tier; a test given by its id on the command line always runs."""
    if part := config.getoption("part"):
        first, count = map(int, part.split("/"))
        items[:] = items[first - 1 :: count]
    tier = config.getoption("tier")
    named = {argument.partition("[")[0] for argument in config.args if "::" in argument}
    chosen = [item for item in items if in_tier(item, tier) or item.nodeid.partition("[")[0] in named]
    dropped = [item for item in items if item not in set(chosen)]
    config.stash[left_out] = Counter((folder(item), "--all" if extended(item) else "") for item in dropped)
    items[:] = chosen
    if dropped:
        config.hook.pytest_deselected(items=dropped)


def in_tier(item: pytest.Item, tier: str) -> bool:
    if tier == "all":
        return True
    if extended(item):
        return False
    if tier == "default":
        return True
    return item.nodeid.startswith(QUICK) and not any(map(item.get_closest_marker, ("root", "slow")))


def extended(item: pytest.Item) -> bool:
    return item.get_closest_marker("extended") is not None


def folder(item: pytest.Item) -> str:
    return "/".join(item.nodeid.split("/")[:2])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Report the tests outside the tier, by folder."""
    for (name, option), count in sorted(config.stash.get(left_out, Counter()).items()):
        tests = "test" if count == 1 else "tests"
        command = f"scripts/test {option}".strip()
        terminalreporter.write_line(f"NOT RUN in this tier: {count} {tests} of {name} (run {command})")
