"""Mixed connections to a lab's server until standard input ends: long ones at a steady rate, short, lossy, failed ones.

python -m tests.chaos.traffic SENDS_PER_S ADDRESS...

A line on standard input that is a number changes the rate.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import sys

STEADY_PORT, ECHO_PORT = 5001, 5002
LOSSY_PORT = ECHO_PORT
BLACKHOLE_PORT, CLOSED_PORT = 5003, 5004
LONG = 8
MESSAGE = b"x" * 100
TICK_S = 0.005
SHORT_EVERY_S = 0.02
CHAT_EVERY_S = 0.05
FAILED_EVERY_S = 0.3
GIVE_UP_S = 3.0


class Rate:
    """Messages per second, as set by the parent."""

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self.ended = asyncio.Event()

    def read(self) -> None:
        data = os.read(0, 4096)
        if not data:
            asyncio.get_running_loop().remove_reader(0)
            self.ended.set()
        elif lines := data.split():
            self.per_s = float(lines[-1])


async def steady(rate: Rate, address: str) -> None:
    """Send on long connections, and replace those that break."""
    connections: list[socket.socket] = []
    loop = asyncio.get_running_loop()
    owed, before = 0.0, loop.time()
    for turn in itertools.count():
        await asyncio.sleep(TICK_S)
        owed = min(owed + rate.per_s * (loop.time() - before), rate.per_s)  # catch up by a second's worth at most
        before = loop.time()
        if len(connections) < LONG:
            with contextlib.suppress(OSError):
                connections.append(connect(address, STEADY_PORT))
            continue
        for number in range(int(owed)):
            connection = connections[(turn + number) % len(connections)]
            try:
                connection.send(MESSAGE)
            except BlockingIOError:
                continue
            except OSError:
                connections.remove(connection)
                connection.close()
                break
        owed -= int(owed)


def connect(address: str, port: int) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=GIVE_UP_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(False)
    return connection


async def exchange(address: str, size: int, rounds: int) -> None:
    """Talk to the echo server over a lossy link."""
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection(address, LOSSY_PORT)
            try:
                for _ in range(rounds):
                    writer.write(bytes(size))
                    await writer.drain()
                    await reader.readexactly(size)
                    await asyncio.sleep(CHAT_EVERY_S if rounds > 1 else 0)
            finally:
                writer.close()


async def fail(address: str, port: int) -> None:
    """Connect to a port that does not answer."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(GIVE_UP_S):
            _, writer = await asyncio.open_connection(address, port)
            writer.close()


async def main(sends_per_s: float, *addresses: str) -> None:
    rate = Rate(sends_per_s)
    asyncio.get_running_loop().add_reader(0, rate.read)
    print("ready", flush=True)
    tasks = {asyncio.create_task(steady(rate, addresses[0]))}

    async def now_and_then(every_s: float, make: "itertools.cycle[tuple[object, ...]]") -> None:
        for function, *arguments in make:
            await asyncio.sleep(every_s)
            if rate.per_s and len(tasks) < 300:
                task = asyncio.create_task(function(*arguments))  # type: ignore[operator]
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    short = [(exchange, address, size, 1) for size in (1, 200, 3_000, 20_000) for address in addresses]
    chats = [(exchange, address, 100, 200) for address in addresses]
    failed = [(fail, address, port) for port in (BLACKHOLE_PORT, CLOSED_PORT) for address in addresses]
    for every_s, kinds in ((SHORT_EVERY_S, short), (2.0, chats), (FAILED_EVERY_S, failed)):
        task = asyncio.create_task(now_and_then(every_s, itertools.cycle(kinds)))
        tasks.add(task)
    await rate.ended.wait()
    for task in tuple(tasks):
        task.cancel()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), *sys.argv[2:]))
