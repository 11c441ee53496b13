"""The program cache: cached programs are loaded without the compiler; untrusted ones are compiled again."""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from producer.demo.lab import Lab
from producer.kernel.bpf_syscall import RETURN_0
from producer.kernel.capture import Capture
from producer.kernel.hooks import OWN_SOCKETS
from producer.kernel.program_cache import ProgramCache
from tests.support.capture import Pair, Recording, hook_settings, kernel_btf_with, rules
from tests.support.comparison import Trial, segs
from tests.support.rebpf import UNUSED_PORT
from tests.support.rules import filtered

pytestmark = pytest.mark.root

NO_VALUE = bytes.fromhex("9500000000000000")
"""Returns an uninitialized register, which the verifier rejects."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "compiled"


def objects() -> Counter[tuple[str, ...]]:
    """Count the programs and maps that this process holds, by their attributes."""
    found: Counter[tuple[str, ...]] = Counter()
    for each in Path("/proc/self/fdinfo").iterdir():
        if each.exists():
            lines = each.read_text().splitlines()
            made_of = ("prog_type:", "prog_tag:", "map_type:", "key_size:", "value_size:", "max_entries:", "map_flags:")
            found[tuple(line for line in lines if line.startswith(made_of))] += 1
    del found[()]
    return found


def loader_maps() -> str:
    """Return the memory mappings of the loader, which waits to attach."""
    pids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    (loader,) = (pid for pid in pids if b"producer.kernel.loader_child" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return Path(f"/proc/{loader}/maps").read_text()


def load(folder: Path, **others: object) -> tuple[bool, bool, Counter[tuple[str, ...]]]:
    """Load; return whether it was cached, whether the loader has the compiler in memory, and what is loaded."""
    before = objects()
    with Capture(hook_settings(rules=filtered(ports=(UNUSED_PORT,)), cache=folder, **others)) as hooks:
        hooks.load()
        return hooks.cached, "libbcc" in loader_maps(), objects() - before


def test_a_second_start_loads_the_same_without_the_compiler(folder: Path) -> None:
    cached, has_compiler, first = load(folder)
    assert (cached, has_compiler) == (False, True)
    cached, has_compiler, second = load(folder)
    assert (cached, has_compiler) == (True, False)
    assert second == first
    assert sum(first.values()) > 14, "maps and programs"
    assert "libbcc" in next(folder.iterdir()).read_text(), "so that an upgrade is detected"


def test_the_verifier_has_little_to_do(folder: Path) -> None:
    """It works at each start, for a second or so per million instructions; above a million, it rejects a program."""
    with Capture(hook_settings(rules=filtered(ports=(UNUSED_PORT,)), cache=folder)) as hooks:
        hooks.load()
        infos = [each.read_text() for each in Path("/proc/self/fdinfo").iterdir() if each.exists()]
    followed = [int(count) for info in infos for count in re.findall(r"^verified_insns:\s+(\d+)$", info, re.MULTILINE)]
    assert 0 < max(followed) < 150_000


def test_events_of_cached_programs_match_the_wire(lab: Lab, port: int) -> None:
    """A Trial compares both streams with the kernel's counters and a packet capture."""
    settings = hook_settings(rules=filtered(ports=(port,)))
    with Capture(settings) as hooks:
        hooks.load()
    lost = f"tcp dport {port} meta length 113 numgen inc mod 2 == 0 drop"  # 61 bytes of payload, in every second packet
    with Recording(settings) as capture:
        assert capture.kernel.cached
        with rules(lab.server, "prerouting", lost), Trial(capture, lab, port) as trial:
            with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
                pair.exchange(11, 61)
                pair.end()
            assert segs(trial.again(lab.client)) >= 11
            assert segs(trial.sent(lab.client)) > 2 * 11


def test_another_layout_is_compiled_again(folder: Path, tmp_path: Path) -> None:
    btf = kernel_btf_with(tmp_path, {"snd_cwnd": "snd_cwmd"})
    load(folder)
    assert not load(folder, btf=btf)[0]
    assert load(folder)[0]
    assert load(folder, btf=btf)[0]
    assert len(list(folder.iterdir())) == 2


def test_another_size_of_the_ring_needs_no_compilation(folder: Path) -> None:
    load(folder)
    small = {"transmit_pipe": 1 << 16, "retransmit_pipe": 1 << 17}
    cached, _, loaded = load(folder, ring_bytes=small)
    assert cached
    sizes = {line for made_of in loaded for line in made_of if line.startswith("max_entries:")}
    assert {f"max_entries:\t{size}" for size in small.values()} <= sizes


def test_a_damaged_cache_file_is_compiled_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, _, first = load(folder)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:5000] + b"!" + whole[5001:])
    assert load(folder) == (False, True, first)
    assert f"{file.name} is damaged" in caplog.text
    assert load(folder)[0]


def test_a_cached_program_that_the_kernel_rejects_is_compiled_again_and_costs_no_hook(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, first = load(folder)
    (file,) = folder.iterdir()
    kept = ProgramCache(folder)
    found = kept.find(file.stem)
    assert found is not None
    refused = dict.fromkeys(found.programs, RETURN_0) | {OWN_SOCKETS.program: NO_VALUE}
    kept.put(file.stem, replace(found, programs=refused), [])
    assert load(folder) == (False, True, first)
    assert "compiled programs: compiled again: rejected by the kernel" in caplog.text
    assert load(folder)[0]


def test_without_a_usable_cache_folder_the_start_compiles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cached, _, loaded = load(tmp_path / "file" / "compiled")
    assert not cached
    assert loaded
    assert [record.getMessage() for record in caplog.records if "compiled programs" in record.getMessage()] == [
        f"compiled programs: {tmp_path}/file is a link or not a folder"
    ]
