"""Where the BPF sources and the schemas are: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
IMPORTED_FROM = _PACKAGE.parent
"""The folder from which `import producer` takes this package."""


def _data(name: str) -> Path:
    installed = _PACKAGE / "data" / name
    return installed if installed.is_dir() else IMPORTED_FROM / name


BPF = _data("bpf")
SCHEMAS = _data("schemas")
