"""Traffic on loopback at a steady rate: small segments on a few connections, and their acknowledgements.

python tests/bench/traffic.py SENDS_PER_SECOND SECONDS PORT

It ends early when its standard input does. It prints the bytes sent by port, in JSON.
"""

import json
import select
import socket
import sys
import threading
import time

CONNECTIONS = 8
MESSAGE = b"x" * 100


def receive(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def main(rate: int, seconds: float, port: int) -> None:
    senders = []
    with socket.create_server(("127.0.0.1", port)) as listener:
        for _ in range(CONNECTIONS):
            sender = socket.create_connection(("127.0.0.1", port))
            sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            senders.append(sender)
            threading.Thread(target=receive, args=(listener.accept()[0],), daemon=True).start()
    start, sent = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < seconds:
        while sent < rate * elapsed:
            senders[sent % CONNECTIONS].sendall(MESSAGE)
            sent += 1
        if select.select([sys.stdin], [], [], 0.002)[0]:
            break
    counts = [sent // CONNECTIONS + (number < sent % CONNECTIONS) for number in range(CONNECTIONS)]
    ports = [sender.getsockname()[1] for sender in senders]
    print(json.dumps({port: count * len(MESSAGE) for port, count in zip(ports, counts, strict=True)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
