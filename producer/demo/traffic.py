"""The traffic client and server of the lab: bulk transfers, many short connections, and small messages with pauses.

Bulk transfers cause fast retransmits, pauses cause tail loss probes, and short connections lose SYNs and SYN-ACKs. Both
programs print `ready`, run until their standard input ends, and need only Python.
"""

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

_BULK_PORT, _ECHO_PORT = 5001, 5002
# From asm-generic/socket.h, missing in Python. Without an fq queue on the interface, TCP itself paces.
_SO_MAX_PACING_RATE = 47
_PR_SET_PDEATHSIG = 1
_BULK_BYTES_PER_S = 1_500_000
_CHUNK = bytes(64 * 1024)
_SHORT_EVERY_S = 0.01
_SHORT_SIZES = (200, 3_000, 20_000)
_MESSAGE_EVERY_S = 0.05


@dataclass(slots=True)
class _Tally:
    connections: int = 0
    failed: int = 0
    payload_bytes: int = 0


def _input_end() -> asyncio.Event:
    """Return an event that is set when standard input ends: the parent requests a stop, or has ended."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            loop.remove_reader(sys.stdin)
            ended.set()

    loop.add_reader(sys.stdin, read)
    return ended


async def _swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, TimeoutError):
        while await reader.read(256 * 1024):
            pass
    writer.close()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, TimeoutError):
        while data := await reader.read(64 * 1024):
            writer.write(data)
            await writer.drain()
    writer.close()


async def serve(*addresses: str) -> None:
    """Listen on the addresses until standard input ends."""
    for address in addresses:
        await asyncio.start_server(_swallow, address, _BULK_PORT, backlog=512)
        await asyncio.start_server(_echo, address, _ECHO_PORT, backlog=512)
    print("ready", flush=True)
    await _input_end().wait()


async def _bulk(tally: _Tally, stop: asyncio.Event, address: str) -> None:
    _, writer = await asyncio.open_connection(address, _BULK_PORT)
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, _BULK_BYTES_PER_S)
    while not stop.is_set():
        writer.write(_CHUNK)
        await writer.drain()
        tally.payload_bytes += len(_CHUNK)
    writer.close()
    await writer.wait_closed()


async def _exchange(tally: _Tally, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int) -> None:
    writer.write(bytes(size))
    await writer.drain()
    await reader.readexactly(size)
    tally.payload_bytes += size


async def _chat(tally: _Tally, stop: asyncio.Event, address: str) -> None:
    reader, writer = await asyncio.open_connection(address, _ECHO_PORT)
    while not stop.is_set():
        await _exchange(tally, reader, writer, 100)
        await asyncio.sleep(_MESSAGE_EVERY_S)
    writer.close()
    await writer.wait_closed()


async def _short(tally: _Tally, address: str, size: int) -> None:
    reader, writer = await asyncio.open_connection(address, _ECHO_PORT)
    await _exchange(tally, reader, writer, size)
    writer.close()
    await writer.wait_closed()


async def _counted(tally: _Tally, connection: Awaitable[None]) -> None:
    tally.connections += 1
    try:
        await connection
    except (OSError, asyncio.IncompleteReadError):
        tally.failed += 1


async def send(*addresses: str) -> None:
    """Send to the addresses until standard input ends, then print the totals as JSON."""
    tally = _Tally()
    stop = _input_end()
    print("ready", flush=True)
    async with asyncio.TaskGroup() as tasks:
        long_lived: tuple[Callable[[_Tally, asyncio.Event, str], Awaitable[None]], ...] = (_bulk, _chat)
        for start, address in itertools.product(long_lived, addresses):
            tasks.create_task(_counted(tally, start(tally, stop, address)))
        for address, size in itertools.cycle(itertools.product(addresses, _SHORT_SIZES)):
            tasks.create_task(_counted(tally, _short(tally, address, size)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _SHORT_EVERY_S)
                break
    print(json.dumps(asdict(tally)), flush=True)


if __name__ == "__main__":
    # If the parent is killed, the other host ends, too, and connections to it would stay open for minutes.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    asyncio.run({"serve": serve, "send": send}[sys.argv[1]](*sys.argv[2:]))
