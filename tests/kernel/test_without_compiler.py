"""Hosts without bcc and LLVM: `rebpf compile` makes the programs, and the producer captures and delivers with them."""

import contextlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from producer import __version__
from producer.events import layout_check
from producer.kernel.bpf_syscall import RETURN_0
from producer.kernel.btf import VMLINUX, Btf
from producer.kernel.features import Features
from producer.kernel.hooks import OWN_SOCKETS
from producer.kernel.loader_child import BCC_MISSING
from producer.kernel.program_cache import from_json
from producer.kernel.program_files import Identity, packed
from producer.paths import BPF
from tests.support.capture import ALLOWED, kernel_btf_with
from tests.support.rebpf import command, rebpf, repeating

pytestmark = [pytest.mark.root, pytest.mark.timeout(1200)]

FIX = "run `rebpf compile` of this version for this kernel, on a host with bcc"
NO_VALUE = bytes.fromhex("9500000000000000")
"""Returns an uninitialized register, which the verifier rejects."""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for this machine's kernel."""
    path = tmp_path_factory.mktemp("programs") / "this-kernel"
    done = subprocess.run(command("compile", "-o", path), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{path}: 33 combinations of hooks, ")
    assert path.stat().st_mode & 0o777 == 0o644, "the service's user reads it"
    return path


@pytest.fixture
def without_compiler(tmp_path: Path) -> Sequence[str]:
    """A prefix for a command: bcc's module is an empty folder there, and bcc's and LLVM's libraries are /dev/null."""
    (tmp_path / "empty").mkdir()
    libraries = [
        path for name in ("libbcc*", "libLLVM*", "libclang*") for path in Path("/usr/lib").glob(f"*/{name}.so*")
    ]
    folders = [path.resolve() for path in Path("/usr/lib/python3/dist-packages").glob("bcc")]
    assert libraries
    assert folders
    mounts = [f"mount --bind /dev/null {path}" for path in {path.resolve() for path in libraries}]
    mounts += [f"mount --bind {tmp_path}/empty {path}" for path in folders]
    script = "\n".join([*mounts, 'exec "$@"'])
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("NO MOUNT NAMESPACE: it needs root and unshare")
    for module in ("import bcc; bcc.BPF", "import ctypes; ctypes.CDLL('libbcc.so.0')"):
        assert subprocess.run([*prefix, "/usr/bin/python3", "-c", module], capture_output=True).returncode
    return prefix


def settings(folder: Path, programs: Path, *lines: str) -> Path:
    path = folder / "rebpf.toml"
    own = [f'state_dir = "{folder}/state"', 'metrics.listen = "127.0.0.1:0"', f'capture.programs = "{programs}"']
    hooks = f"capture.hooks = {json.dumps(ALLOWED)}"
    path.write_text("\n".join([*own, hooks, *lines, ""]))
    return path


@contextlib.contextmanager
def connections(port: int) -> Iterator[None]:
    """Open and close connections to a port of the loopback while the context lasts."""

    def one() -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            accepted, _ = listener.accept()
            with accepted:
                client.sendall(b"hello")
                accepted.recv(5, socket.MSG_WAITALL)

    with socket.create_server(("127.0.0.1", port)) as listener, repeating(one, 0.05):
        yield


def test_it_captures_and_delivers(programs: Path, without_compiler: Sequence[str], tmp_path: Path, port: int) -> None:
    config = settings(tmp_path, programs)
    checked = rebpf("check", "--local", "--config", config, before=without_compiler)
    assert checked.returncode == 0, checked.stdout
    assert f"ok      programs: {programs} fits: transmit=" in checked.stdout
    assert " bcc: " not in checked.stdout
    with connections(port):
        arguments = ("--config", config, "--port", port, "--duration", 3, "--json")
        ran = rebpf("run", *arguments, before=without_compiler)
    assert ran.returncode == 0, ran.stderr
    assert f" programs={programs} " in ran.stderr
    balances = json.loads(ran.stdout.splitlines()[-1])
    for topic in ("tcp_transmit", "tcp_flow"):
        assert balances[topic]["passed"] == balances[topic]["delivered"] > 0, balances
    assert not (tmp_path / "state" / "compiled").exists()


def test_without_programs_that_fit_it_says_what_to_do(
    programs: Path, without_compiler: Sequence[str], tmp_path: Path
) -> None:
    """Another kernel is one whose structs differ."""
    btf = kernel_btf_with(tmp_path, {"snd_cwnd": "snd_cwmd"})
    config = settings(tmp_path, programs, f'capture.btf = "{btf}"')
    reason = f"{programs}: made for another kernel, whose structs or features differ from this one's: {FIX}"
    ran = rebpf("run", "--config", config, "--duration", 0, before=without_compiler)
    assert ran.returncode == 69
    assert ran.stderr.splitlines()[-1].startswith("rebpf: bcc is missing: install the package python3-bpfcc")
    assert reason in ran.stderr
    checked = rebpf("check", "--local", "--config", config, before=without_compiler)
    assert checked.returncode == 69
    assert f"no      programs: no programs in capture.programs fit: {reason}" in checked.stdout
    assert "MISSING bcc: bcc is missing" in checked.stdout


def test_it_compiles_nothing_and_says_why(without_compiler: Sequence[str], tmp_path: Path) -> None:
    done = rebpf("compile", "-o", tmp_path / "out", before=without_compiler)
    assert (done.returncode, done.stderr) == (69, f"rebpf: {BCC_MISSING}\n")
    assert not (tmp_path / "out").exists()


def test_with_the_compiler_programs_that_do_not_fit_are_compiled(programs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(packed(replace(identity(), made_of="other", version="0.0.9"), {}))
    other.chmod(0o644)
    ran = rebpf("run", "--config", settings(tmp_path, other), "--duration", 0)
    assert ran.returncode == 0, ran.stderr
    assert f"{other}: made by ReBPF 0.0.9, whose programs differ from those of {__version__} here: {FIX}" in ran.stderr
    assert " programs=" not in ran.stderr


def identity() -> Identity:
    btf = Btf.load()
    return Identity.of(__version__, BPF, layout_check(), btf, Features.find(btf))


def test_programs_that_the_kernel_rejects_are_named_and_compiled_where_there_is_a_compiler(
    programs: Path, without_compiler: Sequence[str], tmp_path: Path
) -> None:
    _, _, *lines = programs.read_text().splitlines()
    known = {each["hooks"]: each for each in map(json.loads, lines)}
    broken = tmp_path / "broken"
    everything = {hooks: from_json(each) for hooks, each in known.items()}
    for hooks, each in everything.items():
        everything[hooks] = replace(
            each, programs={**dict.fromkeys(each.programs, RETURN_0), OWN_SOCKETS.program: NO_VALUE}
        )
    broken.write_bytes(packed(identity(), everything))
    broken.chmod(0o644)
    config = settings(tmp_path, broken)
    ran = rebpf("run", "--config", config, "--duration", 0, before=without_compiler)
    assert ran.returncode == 69
    assert "the kernel rejects the program that tracks own sockets" in ran.stderr
    ran = rebpf("run", "--config", config, "--duration", 0)
    assert ran.returncode == 0, ran.stderr
    assert f"{broken}: rejected by the kernel: " in ran.stderr


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, 64, "--btf: {path}: No such file or directory"),
        (lambda btf: b"\x7fELF, and no BTF", 69, "not BTF: wrong magic number"),
        (lambda btf: btf[:100_000], 69, "truncated BTF: copy the file again"),
        (lambda btf: btf.replace(b"\0bpf_ringbuf_reserve\0", b"\0bpf_ringbuf_reversed\0"[:20] + b"\0"), 69,
         "the BTF belongs to a kernel without BPF ring buffers: ReBPF needs Linux 5.10 or later"),
        (lambda btf: btf.replace(b"\0tcp_sock\0", b"\0tcp_sack\0"), 69, "lack members that ReBPF needs: tcp_sock."),
        (lambda btf: btf.replace(b"\0pt_regs\0", b"\0pt_rags\0"), 69, "the BTF belongs to a kernel for another "),
    ],
)  # fmt: skip
def test_wrong_input_to_compile_is_refused_in_one_line(
    tmp_path: Path, content: Callable[[bytes], bytes] | None, code: int, says: str
) -> None:
    path = tmp_path / "btf"
    if content:
        path.write_bytes(content(VMLINUX.read_bytes()))
    done = rebpf("compile", "--btf", path, "-o", tmp_path / "out")
    assert done.returncode == code
    assert says.format(path=path) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
