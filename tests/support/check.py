"""Runs `rebpf check`, also in a mount namespace where something is missing."""

from collections.abc import Sequence
from pathlib import Path

from tests.support.rebpf import rebpf


def inside(script: str) -> Sequence[str]:
    """Return what runs a command in a mount namespace of its own, after a shell's script."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", f'{script}\nexec "$@"', "sh"]


def check(folder: Path, *arguments: object, config: str = "", before: Sequence[str] = ()) -> tuple[int, dict[str, str]]:
    """Return the exit code of `rebpf check`, and its lines by subject; the last of a subject counts."""
    path = folder / "rebpf.toml"
    path.write_text(f'state_dir = "{folder}/state"\n{config}')
    done = rebpf("check", "--config", path, *arguments, before=before)
    assert done.stderr == ""
    return done.returncode, {line[8:].partition(": ")[0]: line for line in done.stdout.splitlines()}
