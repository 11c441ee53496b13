"""`rebpf top` of a fleet in a terminal: keys, filters and the end, without root."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from producer.encode.batch import BatchEncoder
from producer.events import RETRANSMITS, Batch
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema
from producer.view.terminal import _ENTER, _LEAVE
from tests.support.encoding import OFFSET_NS, messages
from tests.support.mock_topics import Cluster
from tests.support.pty_command import PtyCommand
from tests.support.rebpf import command, repeating, wait_until
from tests.support.views import retransmits

pytestmark = pytest.mark.slow

PEERS = ("10.2.0.7", "10.2.0.8")


@contextmanager
def fleet(columns: int, lines: int, **env: str) -> Iterator[PtyCommand]:
    """Run the view on the topics of a host that retransmits to two peers, more to the first."""
    schema = load_schema(RETRANSMITS.schema_file)
    fields = {"host": "web-1", "boot_id": "boot"}
    encoder = BatchEncoder(RETRANSMITS, schema, RETRANSMITS.fixed_schema_id, fields, CgroupPaths(None), "host")
    rows = retransmits(
        *({"cause": "rto", "daddr": peer, "sk_cookie": 1 + at, "segs": 9 - at} for at, peer in enumerate(PEERS))
    )
    values = [value for _, value in messages(encoder.encode(Batch(RETRANSMITS, rows), OFFSET_NS))]
    cluster = Cluster()
    try:
        for value in values:
            cluster.put(RETRANSMITS.topic, value)
        with (
            repeating(lambda: [cluster.put(RETRANSMITS.topic, value) for value in values], 0.3),
            PtyCommand(command("top", "--brokers", cluster.brokers, "host web-*"), columns, lines, **env) as top,
        ):
            top.wait_for(lambda screen: len(screen) > 4 and screen[3].startswith(f">{PEERS[0]} "), "peers")
            yield top
    finally:
        cluster.close()


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 50)])
def test_keys_change_the_screen_and_ctrl_c_restores_it(columns: int, lines: int) -> None:
    with fleet(columns, lines) as top:
        screen = top.wait_for(lambda screen: PEERS[1] in screen[4], "the second peer")
        assert len(screen) == lines
        assert max(map(len, screen)) <= columns
        top.press("h")
        top.wait_for(lambda screen: screen[3].startswith(">web-1 "), "hosts")
        top.press(f"p/ and peer {PEERS[1]}\r")
        top.wait_for(lambda screen: screen[3].startswith(f">{PEERS[1]} ") and not screen[4], "the filter")
        top.press("\r")
        top.wait_for(lambda screen: screen[4].startswith(" RETR") and PEERS[1] in screen[5], "details")
        top.press("\x03")
        assert top.wait() == 0
        assert "Traceback" not in top.output
        assert "\x1b[?1049l" in top.output


def test_a_wrong_filter_is_shown_under_its_place_and_without_colors() -> None:
    with fleet(80, 24, NO_COLOR="1") as top:
        top.press("/\x15port x\r")
        screen = top.wait_for(lambda screen: "expected a port" in screen[-1], "the error")
        assert screen[-3:-1] == ["/port x", "      ^"]
        assert "\x1b[1;31m" not in top.output
        top.press("\x03")
        assert top.wait() == 0


def test_the_screen_follows_the_size_of_the_terminal_and_the_shell() -> None:
    with fleet(80, 24, NO_COLOR="") as top:
        top.resize(120, 30)
        top.wait_for(lambda screen: len(screen) == 30 and "FLOWS" in screen[2], "the new size")
        assert "\x1b[1;31m" in "".join(top.colored()) or "\x1b[33m" in "".join(top.colored())
        assert not re.findall(r"[^\r\n\x1bH]\x1b\[[JK]", top.output), "it would erase the last character of a full line"
        top.press("q")
        assert top.wait() == 0


def test_ctrl_z_gives_the_terminal_back_to_the_shell() -> None:
    """Nothing stops here, since the terminal has no shell to continue it: the screen is left, and taken again."""
    with fleet(80, 24) as top:
        assert not top.echoes()
        top.press("\x1a")
        wait_until("the screen again", lambda: top.screen() and top.output.count(_ENTER) == 2)
        assert top.output.index(_LEAVE) < top.output.rindex(_ENTER)
        top.wait_for(lambda screen: screen[3].startswith(f">{PEERS[0]} "), "peers")
        top.press("q")
        assert top.wait() == 0
        assert top.echoes()


def test_a_locale_without_unicode_gets_none() -> None:
    with fleet(200, 50, LC_ALL="C") as top:
        top.wait_for(lambda screen: "LAST MINUTE" in screen[2], "the history")
        top.press("q")
        assert top.wait() == 0
        assert top.output.isascii()
