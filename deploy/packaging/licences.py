"""debian/copyright of a package: ours, and that of each Python package that comes with it, as its wheel states it."""

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
 On Debian systems, the full text is in /usr/share/common-licenses/GPL-2.
"""
_STANZA = """
Files: {files}
Copyright: {holders}
License: {name}
{text}
"""


def copyright_file(ours: str, folder: Path) -> str:
    """Return the file's text for what is installed in `folder`, with the text of our own licence."""
    dists = sorted(each for each in folder.glob("*.dist-info") if not each.name.startswith("rebpf-"))
    return _HEAD.format(ours=_indented(ours)) + "".join(_stanza(each) for each in dists)


def _stanza(dist: Path) -> str:
    metadata = HeaderParser().parsestr((dist / "METADATA").read_text())
    lines = (dist / "RECORD").read_text().splitlines()
    places = sorted({line.partition("/")[0] for line in lines if "/" in line.partition(",")[0] and line[0] != "."})
    alone = sorted(line.partition(",")[0] for line in lines if "/" not in line.partition(",")[0])
    names = [*(f"usr/lib/rebpf/{place}/*" for place in places), *(f"usr/lib/rebpf/{name}" for name in alone)]
    text = "\n".join(path.read_text().strip() for path in _texts(dist))
    holders = sorted(set(re.findall(r"^[ #*]*(?:Copyright)\s*:?\s*(?:\(c\)|©)?\s*(.*\S)", text, re.M | re.I)))
    name = metadata["License-Expression"] or (metadata["License"] or "other").splitlines()[0]
    return _STANZA.format(
        files="\n ".join(names),
        holders="\n ".join(holders) or f"the authors of {metadata['Name']}",
        name=re.sub(r"\s+", "-", name) + f"-{metadata['Name'].lower()}",
        text=_indented(text),
    )


def _texts(dist: Path) -> list[Path]:
    """Return the files of a distribution's licence."""
    names = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|AUTHORS)", re.I)
    return sorted(path for path in dist.rglob("*") if path.is_file() and names.match(path.name))


def _indented(text: str) -> str:
    return "\n".join(f" {line}" if line.strip() else " ." for line in text.strip().splitlines())
