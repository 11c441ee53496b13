"""The documents, and the tables of fields in them."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FIELD = re.compile(r"\| `(\w+)` \| ([^|]+) \| (.*?)(?: \*\((\w+) only\)\*)? \|")


def type_of(field: dict[str, Any]) -> str:
    kind = field["type"]
    optional = isinstance(kind, list)
    if optional:
        kind = kind[1]
    if isinstance(kind, dict) and kind["type"] == "map":
        return f"map of {kind['values']}"
    if isinstance(kind, dict):
        kind = f"{kind['type']} ({kind['logicalType']})"
    return f"{kind} or null" if optional else str(kind)
