"""Reports of open connections are made in steps, each of a bounded number of sockets, so that none delays the agent."""

import contextlib
import itertools
import socket

import pytest

from producer.demo.lab import Lab
from producer.events import FLOWS, REASONS
from producer.kernel import capture
from tests.support.capture import Recording, cookie_of, hook_settings, inside
from tests.support.rules import filtered

pytestmark = pytest.mark.root

CONNECTIONS = 53
SOCKETS_PER_STEP = 7


def test_a_step_reports_a_bounded_number_of_connections_and_all_steps_report_all(
    lab: Lab, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "FLOWS_PER_STEP", SOCKETS_PER_STEP)
    settings = hook_settings(streams=(FLOWS,), rules=filtered(ports=[port]))
    with Recording(settings) as recording, contextlib.ExitStack() as stack:
        with inside(lab.client):
            listener = stack.enter_context(socket.create_server((lab.client.ipv4, port), backlog=CONNECTIONS))
            cookies = []
            for _ in range(CONNECTIONS):
                client = stack.enter_context(socket.create_connection((lab.client.ipv4, port)))
                accepted = stack.enter_context(listener.accept()[0])
                cookies += [cookie_of(client), cookie_of(accepted)]
        counts = [0]
        for _ in recording.kernel.report_some_flows():
            counts.append(len(recording.all(FLOWS)))
        rows = recording.all(FLOWS)
    steps = [after - before for before, after in itertools.pairwise(counts)]
    assert 0 < max(steps) <= SOCKETS_PER_STEP
    # Sockets of other processes that open or close between two steps may shift one of ours.
    assert set(rows["flow"]["sk_cookie"].tolist()) <= set(cookies)
    assert len(set(rows["flow"]["sk_cookie"].tolist())) > len(cookies) // 2
    assert set(rows["reason"]) == {REASONS.index("interval")}
