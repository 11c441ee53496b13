"""All targets by name."""

from tests.fuzz.engine import Target
from tests.fuzz.targets import configs, disk, events, process, servers

_ALL = (*configs.TARGETS, *disk.TARGETS, *events.TARGETS, *servers.TARGETS, *process.TARGETS)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}
