"""`rebpf top`: a live table of who retransmits, of this host or of a fleet."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Self

from producer.host.output import echo
from producer.host.progress import Progress
from producer.host.signals import Flag
from producer.host.text import lines as as_lines
from producer.host.text import to_json
from producer.view.filter import parse
from producer.view.flows import HISTORY_S, Flows
from producer.view.kernel_count import KernelCount
from producer.view.keys import Choice
from producer.view.records import Records
from producer.view.screen import Display, Frame, render
from producer.view.table import Table, details, table
from producer.view.terminal import Terminal

_REFRESH_S = 1.0
_KEYS_S = 0.1
_FORGET_S = 10.0
_MAX_LINES = 200


class Source(Protocol):
    """Where records come from."""

    is_local: bool

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def earlier(self) -> Iterable[Records]:
        """Return records of connections from before the view, to which later ones are compared."""

    def read(self) -> Iterable[Records]:
        """Return the new records."""

    def report(self) -> None:
        """Ask for a record of each open connection, if that is possible."""

    def lost(self) -> int:
        """Return the number of events that are missing."""


class Top:
    """The view: reads a source and makes frames. `netns` is this network namespace if the source is this host."""

    def __init__(self, source: Source, choice: Choice, window_s: float, name: str) -> None:
        self._source, self._window_s, self._name = source, window_s, name
        self.choice = choice
        self._filter = parse(choice.filter_text)
        self._netns = Path("/proc/self/ns/net").stat().st_ino if source.is_local else 0
        self._forgot_s = time.monotonic()
        self._frame: Frame | None = None
        self._followed: str | None = None
        """The name of the selected line, while the selection follows it."""
        self._begin()

    def _begin(self) -> None:
        """Start to count."""
        self._flows = Flows(time.time_ns(), self._netns)
        self._now_s = time.monotonic()
        self._reads_s = deque([self._now_s])  # the start of the current window, and later reads
        self._kernel = KernelCount()
        for records in self._source.earlier():
            # They arrived before the time that rates cover.
            self._flows.add(records.select(self._filter(records)), self._now_s - HISTORY_S)
        if self._source.is_local:
            self._kernel.begin(self._take_in)

    def _take_in(self) -> int:
        """Take the new records in; return the segments seen so far in this network namespace."""
        for records in self._source.read():
            self._flows.add(records.select(self._filter(records)), self._now_s)
        return self._flows.in_netns

    def read(self, *, report: bool) -> None:
        """Take the new records in."""
        now = self._now_s = time.monotonic()
        if self._source.is_local:
            self._kernel.update(self._take_in)
        if report:
            self._source.report()
        self._take_in()
        self._reads_s.append(now)
        while len(self._reads_s) > 1 and self._reads_s[1] <= now - self._window_s:
            self._reads_s.popleft()
        if now - self._forgot_s > _FORGET_S:
            self._flows.forget(now)
            self._forgot_s = now

    def press(self, key: str) -> None:
        """Apply a key."""
        before, self.choice = self.choice, self.choice.after(key)
        if (self.choice.selected, self.choice.follows) != (before.selected, before.follows):
            self._followed = self._shown_name(self.choice.selected) if self.choice.follows else None
        if self.choice.paused and not before.paused:
            self._frame = None  # for a frame with more lines than the screen
        if self.choice.filter_text != before.filter_text:
            self._filter = parse(self.choice.filter_text)
            self._begin()

    def _covered_s(self) -> float:
        """Return the time that rates cover: from one read to another, at least the window once that has passed."""
        return max(_REFRESH_S, self._reads_s[-1] - self._reads_s[0])

    def table(self, count: int) -> Table:
        """Return the table as of the last read."""
        return table(self._flows, self.choice.by, self.choice.sort, self._reads_s[-1], self._covered_s(), count)

    def frame(self, height: int) -> Frame:
        """Return what to show on a screen of this height; while paused, what was shown."""
        before = self._frame if self.choice.paused else None
        if before is not None and (before.by, before.sort) == (self.choice.by, self.choice.sort):
            found, kernel, lost, covered_s = before.table, before.kernel, before.lost, before.window_s
        else:
            reached = _MAX_LINES if self.choice.paused else min(height + self.choice.selected, _MAX_LINES)
            found = self.table(max(height, reached))
            before, kernel, lost, covered_s = None, self._counts(), self._source.lost(), self._covered_s()
        name = self._select(found)
        choice, rows = self.choice, None
        if choice.has_details and name:
            rows = before.details if before is not None and before.name == name else None
            rows = rows or details(self._flows, choice.by, name, self._reads_s[-1], height)
        self._frame = Frame(
            found, choice.by, choice.sort, choice.filter_text, self._name, choice.selected, choice.paused,
            choice.message, rows, kernel, lost, name, choice.has_help, covered_s,
        )  # fmt: skip
        return self._frame

    def _shown_name(self, selected: int) -> str | None:
        lines = self._frame.table.lines if self._frame is not None else []
        return lines[min(selected, len(lines) - 1)].name if lines else None

    def _select(self, found: Table) -> str:
        """Return the name of the selected line. A line that is followed may have moved, or left the table."""
        names = [line.name for line in found.lines]
        selected = min(self.choice.selected, max(0, len(names) - 1))
        if self._followed in names and names[selected] != self._followed:  # several lines may have the same name
            selected = names.index(self._followed)
        self.choice = replace(self.choice, selected=selected)
        if self._followed is not None and (self._followed in names or self.choice.has_details):
            return self._followed
        name = names[selected] if names else ""
        if self.choice.follows:
            self._followed = name
        return name

    def _counts(self) -> tuple[int, int] | None:
        """Return the kernel's count and ours; with a filter, they differ by design."""
        if not self._source.is_local or self.choice.filter_text:
            return None
        return self._kernel.counted, self._kernel.seen

    def as_dict(self) -> dict[str, Any]:
        """Return the table for JSON output."""
        found, kernel = self.table(_MAX_LINES), self._counts()
        return {
            "by": self.choice.by,
            "window_s": round(self._covered_s(), 6),
            "filter": self.choice.filter_text,
            "total": found.total.as_dict(),
            "lines": [line.as_dict() for line in found.lines],
            "groups": found.groups,
            "kernel_retrans_segs": kernel and kernel[0],
            "seen_retrans_segs": kernel and kernel[1],
            "lost": self._source.lost(),
        }


def watch(source: Source, choice: Choice, window_s: float, name: str, stop: Flag, *, color: bool) -> None:
    """Show the table on the terminal until q is pressed, or `stop` is set."""
    with source:
        top = Top(source, choice, window_s, name)
        with Terminal(color=color) as terminal:
            due, shown = 0.0, None
            while not stop.is_set() and not top.choice.quits:
                now = time.monotonic()
                is_due = now >= due
                if is_due or not source.is_local:
                    top.read(report=is_due)
                keys = terminal.keys(0 if is_due else _KEYS_S)
                for key in keys:
                    top.press(key)
                display = terminal.display()
                if is_due or keys or display != shown:
                    terminal.draw(render(top.frame(display.height), display))
                    shown = display
                if is_due:
                    due = now + _REFRESH_S


def once(source: Source, choice: Choice, window_s: float, name: str, stop: Flag, *, as_json: bool, width: int) -> None:
    """Print the table of one window."""
    with source:
        top = Top(source, choice, window_s, name)
        top.read(report=True)  # to which the later ones are compared
        end = time.monotonic() + window_s
        with Progress(f"watching for {window_s:g} s"):
            while not stop.is_set() and (rest := end - time.monotonic()) > 0:
                if source.is_local:
                    stop.wait(min(_REFRESH_S, rest))
                top.read(report=True)
        if as_json:
            echo(to_json(top.as_dict()))
            return
        frame = replace(top.frame(_MAX_LINES), selected=-1)  # there is nothing to select
        height = len(frame.table.lines) + 4
        shown = render(frame, Display(width, height, color=False, unicode=True))
        echo(as_lines(line.rstrip() for line in shown[:-1]))
