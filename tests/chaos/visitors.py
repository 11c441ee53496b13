"""Many concurrent visitors of the producer's endpoint, some slow and some invalid.

python -m tests.chaos.visitors HOST PORT SECONDS SEED
"""

import contextlib
import random
import socket
import sys
import threading
import time

PATHS = ("/metrics", "/status", "/readyz", "/healthz", "/no-such-page", "/" + "x" * 20_000)
QUICK, SLOW = 16, 24


def quick(host: str, port: int, end: float, chance: random.Random) -> None:
    """Request pages in a loop; some leave before the answer."""
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5) as visitor:
            method = chance.choice(["GET", "GET", "GET", "HEAD", "POST", "\x16\x03\x01"])
            visitor.sendall(f"{method} {chance.choice(PATHS)} HTTP/1.0\r\n\r\n".encode("latin-1"))
            if chance.random() < 0.9:
                while visitor.recv(1 << 16):
                    pass
        time.sleep(chance.uniform(0.02, 0.3))


def slow(host: str, port: int, end: float, chance: random.Random) -> None:
    """Send a byte now and then."""
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5) as visitor:
            for byte in b"GET /metrics HTTP/1.1\r\nHost: chaos\r\nX-Slow: " + b"x" * 60:
                visitor.sendall(bytes([byte]))
                time.sleep(chance.uniform(0.1, 0.5))
                if time.monotonic() > end:
                    break


def main(host: str, port: int, seconds: float, seed: int) -> None:
    end = time.monotonic() + seconds
    kinds = [quick] * QUICK + [slow] * SLOW
    threads = [
        threading.Thread(target=kind, args=(host, port, end, random.Random(seed + number)))
        for number, kind in enumerate(kinds)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
