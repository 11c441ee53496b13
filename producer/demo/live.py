"""The table of `rebpf top` on the terminal while the demo's traffic runs, from the events that Kafka returns."""

import time
from collections.abc import Callable, Sequence

from producer.commands.tail import Event
from producer.events import FLOWS, RETRANSMITS
from producer.view.flows import Flows
from producer.view.line import is_connection, is_retransmission
from producer.view.records import Records
from producer.view.screen import Frame, render
from producer.view.table import SORTS, table
from producer.view.terminal import Terminal

_REFRESH_S = 1.0
_WINDOW_S = 10.0
_MAX_LINES = 20


class Live:
    """The live table. `retrans_segs` returns the kernel's count, which is shown beside that of the events."""

    def __init__(self, terminal: Terminal, duration_s: float, retrans_segs: Callable[[], int]) -> None:
        self._terminal = terminal
        self._retrans_segs = retrans_segs
        self._flows = Flows(time.time_ns())
        self._started_s = time.monotonic()
        self._end_s = self._started_s + duration_s
        self._due_s = 0.0
        self._seen = 0

    def show(self, events: Sequence[Event]) -> None:
        """Take events in, and draw the table once a second."""
        now_s = time.monotonic()
        for stream, is_of in ((FLOWS, is_connection), (RETRANSMITS, is_retransmission)):
            rows = [event.record for event in events if is_of(event.record)]
            if rows:
                self._flows.add(Records.from_rows(stream, rows), now_s)
        self._seen += sum(event.record["segs"] for event in events if is_retransmission(event.record))
        self._terminal.keys(0)  # Ctrl-Z; others have no effect
        if now_s >= self._due_s:
            self._due_s = now_s + _REFRESH_S
            display = self._terminal.display()
            self._terminal.draw(render(self._frame(now_s), display))

    def _frame(self, now_s: float) -> Frame:
        window_s = max(_REFRESH_S, min(_WINDOW_S, now_s - self._started_s))
        found = table(self._flows, "peer", SORTS[0], now_s, window_s, _MAX_LINES)
        left_s = max(0.0, self._end_s - now_s)
        message = f"{left_s:.0f} s more (or Ctrl-C), then the summary beside the kernel's counters"
        kernel = (self._retrans_segs(), self._seen)
        return Frame(found, "peer", SORTS[0], "", "demo", -1, False, message, None, kernel, 0, window_s=window_s)
