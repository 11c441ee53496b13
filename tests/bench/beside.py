"""What `rebpf top` beside a producer costs the producer: its CPU per event and its losses, with and without the view.

python -m tests.bench.beside [--workload long-60000] [--rounds 5] [--seconds 10]. Needs root and a C compiler. A real
Kafka takes the events. The view runs in a terminal of 200x50 that is read, in every second run.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from producer.paths import IMPORTED_FROM
from tests.bench.agent import one_line, rebpf
from tests.bench.broker import Broker
from tests.bench.contender import Result, measure
from tests.bench.workloads import WORKLOADS
from tests.support.pty_command import PtyCommand
from tests.support.rebpf import command
from tests.support.servers.kafka import KafkaServer


@contextlib.contextmanager
def view() -> Iterator[None]:
    """Run `rebpf top` while the context lasts."""
    done = threading.Event()

    def read(top: PtyCommand) -> None:
        while not done.is_set():
            top.read(0.5)

    with PtyCommand(command("top"), 200, 50) as top:
        top.wait_for(lambda screen: len(screen) == 50, "screen")
        reader = threading.Thread(target=read, args=(top,))
        reader.start()
        yield
        done.set()
        reader.join()
        top.press("q")
        assert top.wait() == 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="long-60000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    port = 10_000 + os.getpid() % 10_000
    found: dict[str, list[Result]] = {"alone": [], "beside top": []}
    with (
        tempfile.TemporaryDirectory() as name,
        KafkaServer(Path(name) / "kafka") as kafka,
        Broker(kafka, 6) as broker,
    ):
        run = rebpf(IMPORTED_FROM, Path(name) / "rebpf", broker.bootstrap, port)("")
        measure(run, WORKLOADS["quiet"], port, 1, broker)  # compiles the programs
        for _ in range(options.rounds):
            for how, results in found.items():
                with view() if how != "alone" else contextlib.nullcontext():
                    results.append(measure(run, WORKLOADS[options.workload], port, options.seconds, broker))
                print(f"  {how}: {one_line(results[-1])}", flush=True)
    alone, beside = ([each.us_per_event for each in results] for results in found.values())
    ratio = statistics.median(with_it / without for without, with_it in zip(alone, beside, strict=True))
    lost = sum(each.lost for each in found["beside top"])
    print(
        f"{options.workload}: {statistics.median(alone):.2f} us/event alone, {statistics.median(beside):.2f} beside"
        f" top, ratio {ratio:.2f} (median of {options.rounds} rounds); {lost} lost beside top"
    )


if __name__ == "__main__":
    main()
