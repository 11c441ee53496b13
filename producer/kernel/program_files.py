"""Files of programs that `rebpf compile` made for a kernel, and a host's search for the one that fits.

A host that has one needs neither bcc nor LLVM. The first line of a file is the SHA-256 of the rest. The second says
what the programs were made of, and for which kernel. Each further one has the programs of one combination of hooks.
Only what the compiler reads decides whether a file fits: the C source, the layouts of the kernel's structs, and the
features of its BPF. So an update of the kernel that changes none of these needs no new file.

Programs are loaded with capabilities, so a file counts only if it, its folder and all parents belong to root, are not
links, and are not writable by others. Standard library only.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from producer.host import state_file
from producer.host.text import parse_json
from producer.kernel import source
from producer.kernel.btf import Btf
from producer.kernel.features import Features, machine
from producer.kernel.hooks import HOOKS_BY_STREAM
from producer.kernel.program_cache import Compiled, as_json, check_folders, from_json, own

MOST_FILES = 256
"""Files of a folder that are looked at, the last ones by name."""
_MOST_FILE_BYTES = 1 << 26
_MOST_REASONS = 3
_FIX = "run `rebpf compile` of this version for this kernel, on a host with bcc"
_FORMAT = "rebpf programs 1"


@dataclass(frozen=True, slots=True)
class Identity:
    """What programs were made of, and for which kernel."""

    version: str
    """Of ReBPF; for people, since a version without a change of the programs needs no other file."""
    machine: str
    made_of: str
    made_for: str

    @classmethod
    def of(cls, version: str, folder: Path, layout_check: str, btf: Btf, features: Features) -> "Identity":
        """Return that of a compilation of the C source in `folder`."""
        made_of, made_for = source.made_of(folder, layout_check), source.made_for(btf, features)
        return cls(version, machine(btf), made_of, made_for)

    def mismatch(self, host: "Identity") -> str | None:
        """Return why programs of this identity do not fit a host of another, or None if they do."""
        if self.machine != host.machine:
            return f"made for {self.machine}, but this host is {host.machine}"
        if self.made_of != host.made_of:
            return f"made by ReBPF {self.version}, whose programs differ from those of {host.version} here"
        if self.made_for != host.made_for:
            return "made for another kernel, whose structs or features differ from this one's"
        return None


def combination(hooks: Mapping[str, str]) -> str:
    """Return the name of the hooks' combination, by stream."""
    return " ".join(f"{stream}={hooks[stream]}" for stream in HOOKS_BY_STREAM if stream in hooks)


def packed(identity: Identity, programs: Mapping[str, Compiled]) -> bytes:
    """Return the content of a file with the programs of each combination of hooks."""
    lines = [json.dumps({"format": _FORMAT, **asdict(identity)})]
    lines += [json.dumps({"hooks": hooks, **as_json(each)}) for hooks, each in programs.items()]
    body = "\n".join(lines).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


class ProgramFiles:
    """The files at `path`: one file, or those in a folder that are not hidden. `refusals` says why some do not fit."""

    def __init__(self, path: Path | None, host: Identity) -> None:
        self.path = path
        self._host = host
        self.refusals: list[str] = []
        self.fitting: Path | None = None
        """The first file that fits."""
        self._lines: list[bytes] = []
        for each in _candidates(path, self.refusals):
            try:
                self._lines = self._read(each)
            except (OSError, ValueError) as error:
                self.refusals.append(f"{each}: {error.strerror if isinstance(error, OSError) else error}")
            else:
                self.fitting = each
                break

    def _read(self, path: Path) -> list[bytes]:
        """Return the lines of a file's programs. ValueError if it does not fit."""
        with own(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
            checksum, _, body = state_file.at_most(file, _MOST_FILE_BYTES).partition(b"\n")
        header, *lines = body.split(b"\n")
        identity = _identity(header)
        if identity is None:
            raise ValueError("not a file of `rebpf compile`")
        if checksum != hashlib.sha256(body).hexdigest().encode():
            raise ValueError("damaged")
        if reason := identity.mismatch(self._host):
            raise ValueError(reason)
        return lines

    def none_fits(self) -> str:
        """Return why no file is used, with the fix; empty without a path."""
        if not self.path:
            return ""
        reasons = self.refusals[:_MOST_REASONS]
        if more := len(self.refusals) - len(reasons):
            reasons.append(f"and {more} more")
        return f"no programs in capture.programs fit: {'; '.join(reasons) or f'{self.path}: no file'}: {_FIX}"

    def find(self, combination: str) -> Compiled | None:
        """Return the programs of a combination of hooks, if a file fits."""
        start = json.dumps({"hooks": combination})[:-1].encode()
        line = next((line for line in self._lines if line.startswith(start)), None)
        try:
            return None if line is None else from_json(parse_json(line))
        except ValueError as error:
            self.refusals.append(f"{self.fitting}: {error}")
            return None


def _candidates(path: Path | None, refusals: list[str]) -> Iterable[Path]:
    if path is None:
        return []
    try:
        check_folders(path.parent)
        if not path.is_dir():
            return [path]
        check_folders(path)
        return sorted(each for each in path.iterdir() if not each.name.startswith("."))[-MOST_FILES:]
    except FileNotFoundError:
        refusals.append(f"{path}: No such file or directory")
    except (OSError, ValueError) as error:
        refusals.append(str(error))
    return []


def _identity(header: bytes) -> Identity | None:
    try:
        known = parse_json(header)
        if known.pop("format") != _FORMAT or not all(isinstance(value, str) for value in known.values()):
            return None
        return Identity(**known)
    except (LookupError, TypeError, AttributeError, ValueError):
        return None
