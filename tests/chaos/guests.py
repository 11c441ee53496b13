"""Creates cgroups and network namespaces, connects from inside, and removes them.

python -m tests.chaos.guests cgroups SEED FOLDER ADDRESS PORT
python -m tests.chaos.guests namespace SEED FOLDER ADDRESS PORT

The first runs in the client's namespace; the second creates a namespace in which it has the address.
"""

import contextlib
import ctypes
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

CLONE_NEWNET = 0x40000000
ODD = (
    b"caf\xe9",
    b"tab\tand\rreturn",  # the kernel allows all bytes in a cgroup's name except a line feed
    b"2026-01-01 INFO ready",
    b"\x1b[31mred\x1b[0m",
    b"\xff" * 255,
    b"a" * 255,
    "\u202egnp".encode(),
    b"%41 %",
    b'quote"{}',
    b"nginx.service",
    b"\xf0\x9f\x98",
)


def cgroups(chance: random.Random, folder: bytes, address: str, port: int) -> None:
    """Create cgroups, enter each, connect, leave and remove it; and create many that stay empty."""
    empty = [os.path.join(folder, b"empty-%d" % chance.randrange(1 << 40)) for _ in range(chance.randrange(300))]
    for path in empty:
        os.mkdir(path)
    for name in chance.sample(ODD, chance.randrange(1, len(ODD))):
        path = folder
        for _ in range(chance.choice([1, 1, 1, 2, 5])):
            path = os.path.join(path, b"%d-" % chance.randrange(1000) + name[:250])
            os.mkdir(path)
        enter(path)
        talk(address, port, chance.randrange(1, 5000))
        enter(folder)
        while path != folder:
            os.rmdir(path)
            path = os.path.dirname(path)
    for path in empty:
        os.rmdir(path)


def enter(folder: bytes) -> None:
    with open(os.path.join(folder, b"cgroup.procs"), "w") as file:
        file.write(str(os.getpid()))


def namespace(chance: random.Random, address: str, port: int) -> None:
    """Create a namespace with the client's address on its loopback, and connections inside it."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    for command in (f"address add {address}/32 dev lo", "link set lo up"):
        subprocess.run(["ip", *command.split()], check=True)
    with socket.create_server((address, port)) as server:
        for _ in range(chance.randrange(1, 20)):
            with socket.create_connection((address, port)) as client:
                with server.accept()[0] as accepted:
                    client.sendall(bytes(chance.randrange(1, 5000)))
                    accepted.recv(1 << 16)
                    accepted.sendall(b"x")
                client.recv(1)


def talk(address: str, port: int, size: int) -> None:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=3) as client:
        client.sendall(bytes(size))
        client.settimeout(3)
        client.recv(1)


def main(kind: str, seed: int, folder: Path, address: str, port: int) -> None:
    chance = random.Random(seed)
    if kind == "cgroups":
        cgroups(chance, os.fsencode(folder), address, port)
    else:
        namespace(chance, address, port)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
