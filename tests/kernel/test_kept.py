"""Hooks that outlive the process are taken over, or replaced without a moment in which none is attached."""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from producer.demo.lab import Lab
from producer.errors import UnavailableError
from producer.events import FLOW_EVENT, FLOWS, REASONS, RETRANSMIT, RETRANSMITS, STREAMS, TRANSMIT, TRANSMITS, Rows
from producer.kernel.bpf_syscall import possible_cpus
from producer.kernel.capture import Capture
from producer.kernel.pinned import PinFolder
from producer.kernel.sequence import EventNumbers
from tests.support.capture import ALLOWED, Pair, hook_settings, wait_for
from tests.support.kept import OTHER_VERSION, Traffic, other_version
from tests.support.programs import ids_of, program_ids
from tests.support.rebpf import UNUSED_PORT
from tests.support.rules import filtered

pytestmark = pytest.mark.root

SYN = 2
CPUS = possible_cpus()


def all_rows(capture: Capture) -> Rows:
    with capture.ring(TRANSMITS) as ring:
        rows: Rows = ring.read(1 << 20).copy()
    return rows


def ids(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows["s"]["cpu"].tolist(), rows["s"]["cpu_seq"].tolist(), strict=True))


def probes(rows: Rows, port: int) -> set[int]:
    """Return the sequence numbers of the bytes that the traffic's client sent."""
    segments = rows["s"]
    return set(segments["seq"][(segments["flow"]["dport"] == port) & (segments["payload_len"] == 1)].tolist())


def test_hooks_that_are_the_same_are_taken_over_with_rings_and_numbers(pins: Path, tmp_path: Path) -> None:
    with Traffic() as traffic:
        settings = hook_settings(rules=filtered(ports=(traffic.port,)))

        def numbers() -> EventNumbers:
            return EventNumbers(tmp_path, "a boot", CPUS)

        with PinFolder(pins) as folder, Capture(settings, folder, numbers()) as capture:
            capture.load()
            capture.attach()
            ring_id = capture.ring_id
            assert ring_id
            traffic.start()
            traffic.wait_more(101)
        traffic.wait_more(101)
        with PinFolder(pins) as folder, Capture(settings, folder, numbers()) as capture:
            capture.load()
            capture.attach()
            assert capture.taken_over
            capture.check()
            assert (capture.ring_id, capture.old_ring_id, capture.old_rings()) == (ring_id, None, [])
            traffic.wait_more(101)
            capture.detach()
            assert list(pins.iterdir()) == []
            traffic.stop()
            last = capture.sequence(TRANSMITS)
            assert len(all_rows(capture)) == capture.counters(TRANSMITS).passed == sum(last)
        assert numbers().start()["transmit"] == last


def test_pins_that_someone_removes_cost_no_event_and_leave_nothing_attached(pins: Path) -> None:
    with Traffic() as traffic:
        settings = hook_settings(rules=filtered(ports=(traffic.port,)))
        with PinFolder(pins) as folder, Capture(settings, folder) as capture:
            capture.load()
            capture.attach()
            capture.check()
            loaded = ids_of(capture)
            traffic.start()
            traffic.wait_more(101)
            shutil.rmtree(pins)
            with pytest.raises(UnavailableError, match="the folder is gone"):
                capture.check()
            traffic.wait_more(101)
            capture.detach()
            capture.check()
            traffic.stop()
            assert len(all_rows(capture)) == capture.counters(TRANSMITS).passed >= 202
    wait_for(lambda: not loaded & program_ids(), "the programs' end")


def test_hooks_of_another_version_stay_until_the_new_ones_are_attached_and_their_rings_can_be_drained(
    pins: Path, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "other").mkdir()
    with Traffic() as traffic:
        argument = json.dumps([str(pins), str(tmp_path / "state"), traffic.port, CPUS, ALLOWED])
        child = subprocess.Popen(
            [sys.executable, "-c", OTHER_VERSION, argument],
            cwd=other_version(tmp_path / "other"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with child:
            try:
                assert child.stdin is not None
                assert child.stdout is not None
                old_ring_id = child.stdout.readline().strip()
                traffic.start()
                traffic.wait_more(211)
                print(file=child.stdin, flush=True)
                assert child.stdout.readline() == "committed\n"
            finally:
                child.kill()
        committed: Rows = np.load(tmp_path / "state" / "committed.npy")
        traffic.wait_more(211)

        settings = hook_settings(rules=filtered(ports=(traffic.port,)))
        numbers = EventNumbers(tmp_path / "state", "a boot", CPUS)
        with PinFolder(pins) as folder, Capture(settings, folder, numbers) as capture:
            capture.load()
            assert not capture.taken_over
            traffic.wait_more(101)
            capture.attach()
            traffic.wait_more(101)
            assert capture.ring_id != capture.old_ring_id == old_ring_id
        traffic.wait_more(101)

        with PinFolder(pins) as folder, Capture(settings, folder, numbers) as capture:
            capture.load()
            capture.attach()
            assert capture.taken_over, "after a crash before the old rings were drained"
            assert capture.old_ring_id == old_ring_id
            traffic.wait_more(101)
            (stream, ring), *others = capture.old_rings()
            assert stream == TRANSMITS
            assert stream.dtype == np.dtype([*TRANSMIT.descr, ("note", "<u8")])
            assert [each.dtype for each, _ in others] == [RETRANSMIT, FLOW_EVENT]
            with contextlib.ExitStack() as stack:
                rings = [stack.enter_context(each) for each in (ring, *(other for _, other in others))]
                old = ring.read(1 << 16).copy()
                ring.commit(ring.position)
                for other in rings[1:]:
                    other.read(1 << 16)  # a slow machine retransmits some segments
                traffic.wait_more(11)
                assert [each.unread for each in rings] == [0, 0, 0], "the old programs have ended"
            capture.drop_old_rings()
            assert capture.old_rings() == []
            assert all(path.name == "manifest" or path.name.endswith(capture.ring_id) for path in pins.iterdir())
            traffic.stop()
            capture.detach()
            new = all_rows(capture)
            assert len(new) == capture.counters(TRANSMITS).passed

        check_without_hole(traffic, committed, old, new)


def check_without_hole(traffic: Traffic, committed: Rows, old: Rows, new: Rows) -> None:
    """Every byte is in a captured segment, and the old ring continues at its last commit."""
    found = set.union(*(probes(rows, traffic.port) for rows in (committed, old, new)))
    segments = committed["s"]
    (first,) = segments["end_seq"][segments["tcp_flags"] == SYN].tolist()
    sent = {(first + i) % 2**32 for i in range(traffic.sent)}
    assert (len(sent - found), len(found - sent)) == (0, 0), "missing, too many"
    every_id = [*ids(committed), *ids(old), *ids(new)]
    assert len(every_id) == len(set(every_id))
    for cpu in range(CPUS):
        numbers = sorted(number for each, number in [*ids(committed), *ids(old)] if each == cpu)
        assert numbers == list(range(1, len(numbers) + 1)), "the old ring holds what was not committed"
    assert new["s"]["cpu_seq"].min() > 1 << 32


def test_hooks_that_are_replaced_twice_leave_all_undrained_rings(pins: Path) -> None:
    """With other ring sizes, and a process that ends each time before it has drained anything."""
    with Traffic() as traffic:
        found: dict[int, Rows] = {}
        for size in (1 << 24, 1 << 25, 1 << 26):
            settings = hook_settings(
                rules=filtered(ports=(traffic.port,)),
                ring_bytes={"transmit_pipe": size, "retransmit_pipe": 1 << 16, "flow_pipe": 1 << 16},
            )
            with PinFolder(pins) as folder, Capture(settings, folder) as capture:
                capture.load()
                capture.attach()
                if not found:
                    traffic.start()
                traffic.wait_more(53)
                found[size] = all_rows(capture)
                if size == 1 << 26:
                    traffic.stop()
                    rings = [ring for stream, ring in capture.old_rings() if stream == TRANSMITS]
                    old = [ring.read(1 << 16) for ring in rings]
                    capture.detach()
                    segments = [probes(rows, traffic.port) for rows in (*old, all_rows(capture))]
                    for seen, whole in zip(found.values(), segments, strict=True):
                        assert len(probes(seen, traffic.port) - whole) == 0
                    found_once = len(set.union(*segments))
                    assert found_once == traffic.sent


def test_hooks_without_the_stream_of_flows_are_replaced_and_their_rings_can_be_drained(pins: Path) -> None:
    """As older versions leave them: their manifest names no iterators."""
    with Traffic() as traffic:
        rules = filtered(ports=(traffic.port,))
        without = hook_settings(rules=rules, streams=(TRANSMITS, RETRANSMITS))
        with PinFolder(pins) as folder, Capture(without, folder) as capture:
            capture.load()
            capture.attach()
            traffic.start()
            traffic.wait_more(53)
        text = json.loads(zlib.decompress(base64.urlsafe_b64decode(os.readlink(pins / "manifest"))))
        assert text["manifest"].pop("iterators") == []
        (pins / "manifest").unlink()
        (pins / "manifest").symlink_to(base64.urlsafe_b64encode(zlib.compress(json.dumps(text).encode())).decode())
        with PinFolder(pins) as folder, Capture(hook_settings(rules=rules), folder) as capture:
            capture.load()
            capture.attach()
            assert not capture.taken_over
            traffic.wait_more(53)
            traffic.stop()
            (stream, ring), (other, _) = capture.old_rings()
            assert (stream.name, other.name) == ("transmit", "retransmit")
            assert len(probes(ring.read(1 << 20), traffic.port)) >= 53
            capture.report_flows()
            with capture.ring(FLOWS) as flows:
                assert len(flows.read(1 << 10)) > 0
            capture.detach()


def test_the_agents_own_traffic_is_no_event_of_the_hooks_that_are_about_to_end(pins: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        rules = filtered(ports=(address[1],))
        with PinFolder(pins) as folder, Capture(hook_settings(rules=rules), folder) as capture:
            capture.load()
            capture.attach()
            socket.create_connection(address).close()
        smaller = hook_settings(rules=rules, ring_bytes=dict.fromkeys((stream.ring for stream in STREAMS), 1 << 16))
        with PinFolder(pins) as folder, Capture(smaller, folder) as capture:
            capture.load()
            with socket.socket() as own:
                capture.exclude_socket(own.fileno())
                own.connect(address)
                port = own.getsockname()[1]
                own.sendall(b"!")
                capture.attach()
                own.sendall(b"!")
            capture.detach()
            (_, ring), *_ = capture.old_rings()
            for flow in (rows["s"]["flow"] for rows in (ring.read(1 << 16), all_rows(capture))):
                assert port not in {*flow["sport"], *flow["dport"]}
            assert ring.position > 0


@pytest.mark.parametrize("wrong", ["ring size", "counters", "program for a map"])
def test_maps_that_do_not_match_the_manifest_are_discarded_and_the_start_continues(
    pins: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = hook_settings(rules=filtered(ports=(UNUSED_PORT,)))
    with PinFolder(pins) as folder, Capture(settings, folder) as capture:
        capture.load()
        capture.attach()
    text = json.loads(zlib.decompress(base64.urlsafe_b64decode(os.readlink(pins / "manifest"))))
    manifest = text["manifest"]
    if wrong == "ring size":
        manifest["rings"][0]["bytes"] *= 2
    else:
        program = manifest["programs"]["transmit"][0]
        manifest["maps"]["counters"] = program if "program" in wrong else manifest["maps"]["own_sockets"]
    (pins / "manifest").unlink()
    (pins / "manifest").symlink_to(base64.urlsafe_b64encode(zlib.compress(json.dumps(text).encode())).decode())
    with PinFolder(pins) as folder, Capture(settings, folder) as capture:
        capture.load()
        assert "hooks of the last run cannot be taken over" in caplog.text
        capture.attach()
        assert capture.counters(TRANSMITS).passed == 0


def test_a_ring_of_garbage_is_taken_over_and_goes_on(pins: Path) -> None:
    with Traffic() as traffic:
        settings = hook_settings(rules=filtered(ports=(traffic.port,)))
        with PinFolder(pins) as folder, Capture(settings, folder) as capture:
            capture.load()
            capture.attach()
            traffic.start()
            traffic.wait_more(53)
            passed = capture.counters(TRANSMITS).passed
            with capture.ring(TRANSMITS) as ring:
                ring.commit(1 << 60)
        with PinFolder(pins) as folder, Capture(settings, folder) as capture:
            capture.load()
            assert capture.taken_over
            with capture.ring(TRANSMITS) as ring:
                traffic.wait_more(53)
                traffic.stop()
                capture.detach()
                rows = ring.read(1 << 20)
                assert len(rows) == ring.records_before > passed


def test_hooks_that_a_stop_could_not_detach_do_not_decide_by_the_rules_that_they_had(pins: Path) -> None:
    with Traffic() as traffic:
        settings = hook_settings(rules=filtered(ports=(UNUSED_PORT,)))
        with PinFolder(pins) as folder, Capture(settings, folder) as capture:
            capture.load()
            capture.attach()
            traffic.start()
            traffic.wait_more(53)
            subprocess.run(["mount", "-o", "remount,ro", pins.parent], check=True)
            try:
                capture.detach()
            finally:
                subprocess.run(["mount", "-o", "remount,rw", pins.parent], check=True)
        settings = hook_settings(rules=filtered(ports=(traffic.port,)))
        with PinFolder(pins) as folder, Capture(settings, folder) as capture:
            capture.load()
            capture.attach()
            traffic.wait_more(53)
            capture.detach()
            traffic.stop()
            assert len(probes(all_rows(capture), traffic.port)) >= 53


def test_open_connections_are_reported_by_the_iterator_that_was_taken_over(pins: Path, lab: Lab, port: int) -> None:
    settings = hook_settings(streams=STREAMS, rules=filtered(ports=[port]))
    with PinFolder(pins) as folder, Capture(settings, folder) as first:
        first.load()
        first.attach()
    with (
        Pair(lab.client, lab.server, lab.server.ipv4, port),
        PinFolder(pins) as folder,
        Capture(settings, folder) as second,
    ):
        second.load()
        assert second.taken_over
        second.attach()
        second.report_flows()
        with second.ring(FLOWS) as ring:
            assert [REASONS[row["reason"]] for row in ring.read(1 << 10)] == ["interval", "interval"]
        second.detach()
