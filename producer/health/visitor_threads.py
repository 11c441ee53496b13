"""Threads for a server's visitors: one for each, and a spare one for all while no other can be started."""

import threading
from queue import SimpleQueue
from socketserver import ThreadingMixIn
from typing import Any


class VisitorThreads(ThreadingMixIn):
    """Mixes into a server. Call `start_spare` before it serves."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any) -> None:
        self._unserved: SimpleQueue[tuple[Any, Any] | None] = SimpleQueue()
        super().__init__(*arguments)

    def start_spare(self) -> None:
        """Start the spare thread, which ends with `server_close`. RuntimeError if that is not possible."""
        threading.Thread(target=self._serve_one_by_one, name="endpoint-spare", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a visitor in a thread, or leave it to the spare one."""
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads for now
            self._unserved.put((request, client_address))

    def server_close(self) -> None:
        """Close the server, and end the spare thread."""
        self._unserved.put(None)
        super().server_close()

    def _serve_one_by_one(self) -> None:
        while visitor := self._unserved.get():
            self.process_request_thread(*visitor)
