"""All targets by name."""

from tests.fuzz.engine import Target
from tests.fuzz.targets import configs, consumers, disk, events, process, servers

_ALL = (*configs.TARGETS, *disk.TARGETS, *events.TARGETS, *consumers.TARGETS, *servers.TARGETS, *process.TARGETS)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}
