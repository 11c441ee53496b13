"""A proxy before a Kafka broker that cuts off the first answers to produce requests, as a broken middlebox may."""

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

_PRODUCE, _METADATA = 0, 3
_CORRELATION_BYTES = 4


class GarblingProxy:
    """A listener that cuts off `count` answers, and passes on all else. Clients see it as the only broker."""

    def __init__(self, broker: str, count: int) -> None:
        self._host, port = broker.split(":")
        self._port = int(port)
        self._listener = socket.create_server((self._host, 0))
        self._own_port: int = self._listener.getsockname()[1]
        self.left = count
        """Answers yet to be cut off."""
        self.address = f"{self._host}:{self._own_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        broker = socket.create_connection((self._host, self._port))
        with client, broker, contextlib.suppress(OSError, EOFError):
            while True:
                request = _receive(client)
                _send(broker, request)
                _send(client, self._garbled(struct.unpack_from(">h", request)[0], _receive(broker)))

    def _garbled(self, api: int, answer: bytes) -> bytes:
        if api == _METADATA:
            return answer.replace(struct.pack(">i", self._port), struct.pack(">i", self._own_port))
        if api == _PRODUCE and self.left:
            self.left -= 1
            return answer[: _CORRELATION_BYTES + 9]
        return answer


def _receive(connection: socket.socket) -> bytes:
    """Return the next request or answer."""
    (size,) = struct.unpack(">i", _exactly(connection, 4))
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise EOFError
    return data


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(struct.pack(">i", len(data)) + data)
