"""The demo: a producer with the in-process test broker, lossy traffic, and what it lost, compared with the kernel.

The producer is the real command in a child process, and the events are read back from Kafka. Everything is in a
temporary folder, unnamed namespaces and child processes, so nothing stays behind, however the demo ends.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from producer.commands.tail import Event, batches
from producer.demo import summary
from producer.demo.lab import Lab, Sent
from producer.demo.live import Live
from producer.demo.reconcile import Comparison, Row, Tally, compare, reasons
from producer.demo.summary import Paths
from producer.errors import BusyError, ConfigError, PermissionDenied, UnavailableError
from producer.events import STREAMS
from producer.host.output import echo
from producer.host.progress import Progress
from producer.host.python_child import python
from producer.host.signals import Flag, SignalFlag, hangup
from producer.host.text import printable, to_json
from producer.view.line import Lines, is_connection, is_retransmission
from producer.view.terminal import Terminal, is_usable

_READY_TIMEOUT_S = 180
_STOP_TIMEOUT_S = 60
# All events have arrived when none came for this long after the end of the traffic.
_QUIET_S = 2.0
_TRANSMIT_LINES_PER_S = 20
_MOST_LINE = 1 << 16
_MOST_PATHS = 4
"""Lines of the summary: all fits one screen."""
_CONFIG = "capture.flow_interval_s = 1\n"
"""The live table shows what long connections send."""
_ERRORS = {error.exit_code: error for error in (PermissionDenied, BusyError, ConfigError)}


def demo(*, duration_s: float, loss: float, as_json: bool, show_events: bool) -> int:
    """Run the demo and print what was lost and the comparison; with `as_json` as one JSON object. Return the exit code.

    With `show_events`, also print retransmissions and a sample of the transmits.
    """
    if os.geteuid() != 0:
        raise PermissionDenied(
            "the demo loads BPF programs and creates network namespaces: run it as root, or with sudo"
        )
    screen = _Screen(quiet=as_json, show_events=show_events)
    stop = SignalFlag()
    for number in (signal.SIGINT, signal.SIGTERM, *hangup()):
        stop.interrupt_on(number)  # the second one ends the demo at once, but cleans up
    with (
        tempfile.TemporaryDirectory(prefix="rebpf-demo-") as folder,
        Lab(loss) as lab,
        _Producer(folder, lab.addresses) as producer,
    ):
        screen.starting(lab, loss)
        with Progress("compiling and loading the BPF programs"):
            ready = producer.wait_ready(stop)
        if ready is None:
            return 0
        screen.ready(ready)
        tally, paths = Tally(), Paths()
        with contextlib.closing(_follow(ready["brokers"])) as source, ThreadPoolExecutor(1) as pool:
            next(source)
            end = threading.Event()

            def pass_on_stop() -> None:
                if stop.is_set():
                    end.set()

            sent = pool.submit(_traffic, lab, duration_s, end)
            try:
                with screen.traffic(duration_s, lab) as show:
                    for events in _events(source, sent, producer, pass_on_stop):
                        _count(tally, paths, events)
                        show(events)
            finally:
                end.set()
            counters = lab.counters()
            _read_rest(source, tally, paths, counters)
        balance = producer.stop()
    screen.report(compare(tally, counters), tally, paths, balance, sent.result())
    return 0


class _Producer:
    """`rebpf run` in a child process that ends with this one; captures only the lab's addresses."""

    def __init__(self, state_dir: str, addresses: Sequence[str]) -> None:
        self._state_dir = state_dir
        self._addresses = addresses
        self._last_lines: deque[str] = deque(maxlen=20)
        self._ready: dict[str, str] | None = None
        self._news = threading.Event()

    def __enter__(self) -> "_Producer":
        addresses = [word for address in self._addresses for word in ("--address", address)]
        config = Path(self._state_dir, "rebpf.toml")
        config.write_text(_CONFIG)
        run = python("producer", "run", "--json", "--config", str(config), "--state-dir", self._state_dir, *addresses)
        # In a new session: Ctrl-C signals only this process, which stops the child after reading all events.
        self._child = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *run],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            start_new_session=True,
            # The user's settings for another producer do not apply here.
            env={name: value for name, value in os.environ.items() if not name.startswith("REBPF_")},
        )
        assert self._child.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._child.stderr,))
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._child.terminate()
        self._end()
        for stream in (self._child.stdout, self._child.stderr):
            assert stream is not None
            stream.close()

    def wait_ready(self, stop: Flag) -> Mapping[str, str] | None:
        """Wait for the ready line and return its fields; None if `stop` was set first."""
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while self._ready is None and not stop.is_set():
            self.check()
            if time.monotonic() > deadline:
                raise UnavailableError(f"the producer was not ready within {_READY_TIMEOUT_S} s")
            self._news.wait(0.1)
        return self._ready

    def check(self) -> None:
        """Raise the producer's error if it has ended."""
        status = self._child.poll()
        if status is not None:
            self._reader.join()
            reason = self._last_lines[-1] if self._last_lines else f"status {status}"
            raise _ERRORS.get(status, UnavailableError)(f"the producer ended: {reason.removeprefix('rebpf: ')}")

    def stop(self) -> dict[str, Any]:
        """Stop the producer and return its balance."""
        self.check()
        self._child.terminate()
        if self._end() != 0:
            self.check()
        assert self._child.stdout is not None
        balance: dict[str, Any] = json.loads(self._child.stdout.read().splitlines()[-1])
        return balance

    def _end(self) -> int:
        try:
            status = self._child.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            status = self._child.wait()
        self._reader.join()
        return status

    def _read(self, stream: TextIO) -> None:
        while line := stream.readline(_MOST_LINE):
            self._last_lines.append(line.rstrip())
            if self._ready is None and "brokers=" in line and "ready" in line.split():
                self._ready = dict(word.split("=", 1) for word in line.split() if "=" in word)
                self._news.set()
        self._news.set()


class _Screen:
    """Output for the user; in JSON mode, only the final object."""

    def __init__(self, *, quiet: bool, show_events: bool) -> None:
        self._console = Console(highlight=False, quiet=quiet)
        self._quiet = quiet
        self._show_events = show_events
        self._color = self._console.color_system is not None and not self._console.no_color
        self._view = Lines(self._console.width, hosts=False, color=self._color, connections=True)
        self._second = 0
        self._shown_this_second = 0

    def starting(self, lab: Lab, loss: float) -> None:
        self._say(
            f"Two network namespaces, {lab.client.ipv4} and {lab.server.ipv4}, also with IPv6, are connected by a link"
            f" that drops {loss * 100:.3g} % of the TCP packets. Loading the hooks."
        )

    def ready(self, ready: Mapping[str, str]) -> None:
        brokers = ready["brokers"]
        hooks = ", ".join(f"{stream.name}s by {ready.get(stream.name, '?')}" for stream in STREAMS)
        self._say(
            f"Capturing {hooks}. Kafka is an in-process test broker at {brokers}, not for production."
            " Any client can read from it, in another terminal:"
        )
        self._say(f"  rebpf tail --brokers {brokers}")

    def _say(self, text: str) -> None:
        self._print(printable(text), markup=False)

    def _print(self, *what: Any, **how: Any) -> None:
        """Format with the console, and write by `echo`."""
        if not self._quiet:
            with self._console.capture() as captured:
                self._console.print(*what, **how)
            echo(captured.get().removesuffix("\n"), color=True)

    @contextlib.contextmanager
    def traffic(self, duration_s: float, lab: Lab) -> Iterator[Callable[[Sequence[Event]], None]]:
        """Yield the function that shows events: as lines, in a live table on a terminal, or not at all."""
        if self._show_events:
            yield self._lines
        elif not self._quiet and is_usable():
            with Terminal(color=self._color) as terminal:
                yield Live(terminal, duration_s, lambda: lab.counters()["RetransSegs"]).show
        else:
            with Progress("sending traffic, and reading its events"):
                yield lambda _: None

    def _lines(self, events: Sequence[Event]) -> None:
        if self._quiet:
            return
        shown = [event.record for event in events if self._is_shown(event)]
        lines = self._view.lines(shown)
        if lines:
            # Without the console, whose formatting costs more than the line.
            echo("\n".join(lines), color=True)

    def _is_shown(self, event: Event) -> bool:
        if is_retransmission(event.record) or is_connection(event.record):
            return True
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._shown_this_second = second, 0
        self._shown_this_second += 1
        return self._shown_this_second <= _TRANSMIT_LINES_PER_S

    def report(
        self, comparison: Comparison, tally: Tally, paths: Paths, balance: Mapping[str, Any], sent: Sent
    ) -> None:
        why = reasons(tally, comparison, balance)
        if self._quiet:
            account = {"rows": [row.as_dict() for row in comparison.rows], "reasons": why, "balance": balance}
            account["worst"] = [path.as_dict() for path in paths.worst(_MOST_PATHS)]
            echo(to_json({**account, "read": tally.events, "repeated": tally.repeated, "missing": tally.missing}))
            return
        self._print()
        total = f"{paths.retransmitted.total()} segments were retransmitted, {sent.connections} connections"
        self._say(f"{total}, {sent.payload_bytes / 1e6:.0f} MB. Who, where, why:")
        self._print(_worst(paths.worst(_MOST_PATHS)))
        self._print()
        self._say("The same counted from the events, and by the kernel:")
        self._print(_table(comparison.rows))
        for topic, account in balance.items():
            lost = ", ".join(f"{reason} {count}" for reason, count in account["lost"].items()) or "0"
            self._say(
                f"{topic}: captured {account['passed']}, delivered {account['delivered']},"
                f" read back {tally.events[topic]}, lost {lost}"
            )
        for reason in why:
            self._print(printable(f"Difference: {reason}."), style="yellow", markup=False)
        if not why:
            self._print("The events and the kernel agree.", style="bold green")


def _worst(paths: Sequence[summary.Path]) -> Table:
    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("sender > receiver", no_wrap=True)
    for heading in ("port", "segments", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why", no_wrap=True, overflow="ellipsis", ratio=1)
    for path in paths:
        causes = ", ".join(f"{cause} {count}" for cause, count in path.causes.most_common())
        where = printable(f"{path.sender} > {path.receiver}")
        table.add_row(where, str(path.port), f"[red]{path.retransmitted}[/]", f"{path.ratio:.1%}", printable(causes))
    return table


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("segments")
    for heading in ("events", "kernel", "difference"):
        table.add_column(heading, justify="right")
    table.add_column("kernel's counter")
    for row in rows:
        difference = f"[yellow]{row.difference:+d}[/]" if row.difference else "[green]0[/]"
        table.add_row(row.what, str(row.seen), str(row.counted), difference, row.counter)
    return table


def _traffic(lab: Lab, duration_s: float, end: threading.Event) -> Sent:
    sent = lab.traffic(duration_s, end)
    lab.wait_idle()
    return sent


def _follow(brokers: str) -> Generator[list[Event]]:
    topics = [stream.topic for stream in STREAMS]
    never = threading.Event()
    return batches(brokers, topics, registry=None, from_beginning=True, stop=never, client_settings={})


def _events(
    source: Iterator[list[Event]], sent: "Future[Sent]", producer: _Producer, each: Callable[[], None]
) -> Iterator[list[Event]]:
    """Yield the events until the traffic has ended."""
    while not sent.done():
        each()
        producer.check()
        yield next(source)
    sent.result()


def _read_rest(source: Iterator[list[Event]], tally: Tally, paths: Paths, counters: Mapping[str, int]) -> None:
    """Read the remaining events, before the stop, since the test broker ends with the producer."""
    last = time.monotonic()
    while not compare(tally, counters).agrees and time.monotonic() - last < _QUIET_S:
        events = next(source)
        if events:
            last = time.monotonic()
        _count(tally, paths, events)


def _count(tally: Tally, paths: Paths, events: Sequence[Event]) -> None:
    for event in events:
        tally.add(event.topic, event.record)
        paths.add(event.record)
