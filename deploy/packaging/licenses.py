"""Writes the copyright file of the package: our license, and the copyright holders of each bundled Python package.

It refers to the license texts in the wheels.
"""

import re
from email.parser import HeaderParser
from pathlib import Path

_HEAD = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: ReBPF

Files: *
Copyright: 2026 The ReBPF authors
License: Expat
{ours}

Files: usr/lib/rebpf/producer/data/bpf/*
Copyright: 2026 The ReBPF authors
License: GPL-2
 The full text is in /usr/share/common-licenses/GPL-2.
"""
_STANZA = """
Files: {files}
Copyright: {holders}
License: {name}
 The full text is in {texts}
"""
_HOLDER = re.compile(r"^[ #*]*Copyright\s*:?\s*(?:\(c\)|©)?\s*(\d.*\w)", re.MULTILINE | re.IGNORECASE)
_TEXT = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|AUTHORS)", re.IGNORECASE)


def copyright_file(ours: str, folder: Path) -> str:
    """Return the text for the distributions in `folder`; `ours` is the text of our license."""
    stanzas = [_stanza(dist) for dist in sorted(folder.glob("*.dist-info"))]
    return _HEAD.format(ours=_indented(ours)) + "".join(stanzas)


def _stanza(dist: Path) -> str:
    metadata = HeaderParser().parsestr((dist / "METADATA").read_text())
    texts = sorted(path for path in dist.rglob("*") if path.is_file() and _TEXT.match(path.name))
    holders = sorted({found for path in texts for found in _HOLDER.findall(path.read_text())})
    name = metadata["License-Expression"] or (metadata["License"] or "other").splitlines()[0]
    return _STANZA.format(
        files="\n ".join(_places(dist)),
        holders="\n ".join(holders) or f"the authors of {metadata['Name']}",
        name=re.sub(r"\s+", "-", f"{metadata['Name'].lower()}'s {name}"),
        texts=",\n ".join(f"/usr/lib/rebpf/{path.relative_to(dist.parent)}" for path in texts),
    )


def _places(dist: Path) -> list[str]:
    """Return the folders and top-level files of a distribution."""
    names = [line.partition(",")[0] for line in (dist / "RECORD").read_text().splitlines()]
    within = {f"{folder}/*" for folder, slash, _ in (name.partition("/") for name in names) if slash and folder != ".."}
    return [f"usr/lib/rebpf/{each}" for each in sorted(within | {name for name in names if "/" not in name})]


def _indented(text: str) -> str:
    return "\n".join(f" {line}" if line.strip() else " ." for line in text.strip().splitlines())
