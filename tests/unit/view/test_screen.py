"""The screen of `rebpf top`: it fits any size, shows numbers in few characters, and keys change what it shows."""

from typing import Any

import pytest
from rich.cells import cell_len

from producer.cli import view as command
from producer.view import table as tables
from producer.view.keys import Choice
from producer.view.screen import Display, Frame, percent, rate, render, sparkline
from producer.view.table import SORTS, Detail, Line, Table
from producer.view.terminal import _parsed

BAD = Line("10.2.0.9", 12_345.0, 7.25, 0.031, [0] * 50 + [9] * 10, {"rto": 7, "fast": 80}, 1500, 250_000, 3, 12, "loss")
GOOD = Line("2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff", 3.0, 0, 0.0, [0] * 60, {}, None, None, 0, 1, "application")
EVIL = Line("\x1b[2Jweb", 0, 0, None, [0] * 60, {}, None, None, 0, 0, None)


def frame(**changed: Any) -> Frame:
    found = Table(BAD._replace(name="total"), [BAD, GOOD, EVIL], 3)
    values = {"by": "peer", "sort": "retransmitted", "filter_text": "", "source": "web-1", "selected": 0,
              "paused": False, "message": "", "details": None, "kernel": (7, 7), "lost": 0, "name": BAD.name,
              "has_help": False, "window_s": 9.6}  # fmt: skip
    return Frame(found, **{**values, **changed})


def display(width: int, height: int, *, color: bool = False) -> Display:
    return Display(width, height, color, unicode=True)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (20, 5), (43, 7), (300, 6), (15, 4), (1, 1)])
def test_the_screen_has_its_size(width: int, height: int) -> None:
    detail = Detail("10.0.0.1:443 > 10.2.0.9:51234", "web-1", "nginx", 7, 0.03, 10, 3, 204_000, 1500, "loss")
    wrong = "/port x\n      ^\nfilter: expected a port from 0 to 65535, or a range (8000-8099), found 'x'"
    shown_frames = (
        frame(), frame(details=[detail]), frame(message=wrong), frame(paused=True, filter_text="port 1"),
        frame(has_help=True),
    )  # fmt: skip
    for shown in shown_frames:
        lines = render(shown, display(width, height))
        assert len(lines) == height
        assert max(map(len, lines)) <= width


@pytest.mark.parametrize("name", ["東京-web-1", "東" * 40, "he\u0301te-1", "x" * 90])
def test_names_of_wide_and_combining_characters_stay_in_their_column(name: str) -> None:
    detail = Detail(f"{name} > {name}", name, name, 7, 0.03, 10, 3, 204_000, 1500, "loss")
    line = BAD._replace(name=name)
    for columns in (80, 200):
        plain, shown = (
            render(Frame(Table(BAD, [each], 1), **{**_fields(frame()), "by": "host"}), display(columns, 24))
            for each in (BAD._replace(name="x" * cell_len(name)), line)
        )
        assert cell_len(shown[3].partition(" 7.2 ")[0]) == len(plain[3].partition(" 7.2 ")[0])
        of_details = render(frame(details=[detail, detail._replace(host="y")], source=name), display(columns, 24))
        assert max(map(cell_len, [*shown, *of_details])) <= columns


def test_80_columns_show_the_peer_and_why() -> None:
    shown = frame()
    lines = render(Frame(Table(BAD, [BAD], 1), **_fields(shown)), display(80, 24))
    assert lines[2].split() == ["PEER", "RETR/S", "RATIO", "SEGS/S", "FAIL", "SRTT", "CAUSE", "LIMIT"]
    assert lines[3].split() == [">10.2.0.9", "7.2", "3.10%", "12.3k", "3", "1.5ms", "fast", "loss"]


def test_a_line_of_a_cause_has_no_columns_of_connections() -> None:
    lines = render(
        Frame(Table(BAD, [BAD._replace(name="rto")], 1), **{**_fields(frame()), "by": "cause"}), display(80, 24)
    )
    assert lines[2].split() == ["CAUSE", "RETR/S", "LAST", "MINUTE"]


def test_thousands_of_failed_connects_fit_their_column() -> None:
    lines = render(Frame(Table(BAD, [BAD._replace(failed=12_345)], 1), **_fields(frame())), display(80, 24))
    assert lines[3].split()[4] == "12.3k"


def test_a_long_name_takes_the_place_of_columns() -> None:
    name = "10.111.139.57:53990 > 10.99.0.7:7411"
    lines = render(Frame(Table(BAD, [BAD._replace(name=name)], 1), **_fields(frame())), display(80, 24))
    assert lines[3].split()[:4] == [*f">{name}".split(), "7.2"]


def test_a_wide_screen_shows_everything() -> None:
    lines = render(frame(), display(200, 50))
    assert "LAST MINUTE" in lines[2]
    assert "fast 80 rto 7" in lines[3]
    assert "kernel RetransSegs 7, seen 7" in lines[1]
    assert GOOD.name in lines[4]


def test_details_name_the_connection_on_any_screen() -> None:
    detail = Detail("10.0.0.1:39212 > 10.2.0.9:51234", "web-1", "nginx", 7, 0.03, 10, 3, 204_000, 1500, "loss")
    narrow, wide = (render(frame(details=[detail]), display(width, 24)) for width in (80, 120))
    assert narrow[2] == "10.2.0.9  last minute: fast 80 rto 7"
    assert narrow[5].endswith(" loss        nginx      10.2.0.9:51234")
    assert wide[5].endswith(" nginx      10.0.0.1:39212 > 10.2.0.9:51234")


def test_details_name_the_hosts_if_there_are_several() -> None:
    of_host = [
        Detail("10.0.0.1:39212 > 10.2.0.9:51234", host, "nginx", 7, 0.03, 10, 3, 0, 0, "loss")
        for host in ("web-1", "web-2")
    ]
    lines = render(frame(details=of_host), display(80, 24))
    assert [line.split()[-2:] for line in lines[5:7]] == [["web-1", "10.2.0.9:51234"], ["web-2", "10.2.0.9:51234"]]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_long_names_of_brokers_leave_the_rates_on_the_screen(width: int) -> None:
    brokers = ",".join(f"kafka-{number}.prod.example.com:9092" for number in range(9))
    assert "7.2 retransmitted/s  3.10%" in render(frame(source=brokers), display(width, 10))[0]


def test_a_flow_that_is_too_long_shows_its_peer() -> None:
    ends = "[2001:db8:ffff:1111:2222:3333:4444:5555]:40006", "[2001:db8:aaaa:1111:2222:3333:4444:5555]:443"
    lines = render(
        Frame(Table(BAD, [BAD._replace(name=" > ".join(ends))], 1), **{**_fields(frame()), "by": "flow"}),
        display(80, 24),
    )
    assert lines[3].startswith(">> [2001:db8:aaaa:1111:")


def test_a_wide_screen_has_room_for_the_flows_of_ipv6() -> None:
    flow = "[2001:db8:ffff:1111::2222]:40006 > [2001:db8:aaaa:1111::1]:443"
    shown = Frame(Table(BAD, [BAD._replace(name=flow)], 1), **{**_fields(frame()), "by": "flow"})
    line = render(shown, display(200, 24))[3]
    assert (line.startswith(f">{flow} "), line.rstrip().endswith("fast 80 rto 7")) == (True, True)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_narrow_screens_drop_what_is_less_important_than_who_loses_how_much(width: int) -> None:
    first = render(frame(), display(width, 10))[0]
    assert "7.2 retransmitted/s  3.10%" in first
    detail = Detail("10.0.0.1:39212 > 10.2.0.9:51234", "web-1", "nginx", 7, 0.03, 10, 3, 0, 0, "loss")
    line = render(frame(details=[detail]), display(width, 10))[5]
    assert line.split()[:2] == ["7", "3.00%"]
    assert line.endswith("10.2.0.9:51234")
    assert "0us" not in line, "no time is measured yet"


def test_details_stay_those_of_their_line_when_it_has_left_the_table() -> None:
    lines = render(frame(details=[], name="10.2.0.77"), display(80, 24))
    assert lines[2] == "10.2.0.77"


def test_the_selected_line_is_on_the_screen() -> None:
    peers = [BAD._replace(name=f"10.2.0.{number}") for number in range(40)]
    shown = Frame(Table(BAD, peers, 40), **{**_fields(frame()), "selected": 30})
    lines = render(shown, display(80, 24))
    assert [line.split()[0] for line in lines[3:-1]] == [
        *(f"10.2.0.{number}" for number in range(11, 30)),
        ">10.2.0.30",
    ]


def test_the_head_says_what_the_rates_cover() -> None:
    first, second = render(frame(), display(80, 24))[:2]
    assert first == "rebpf top  web-1  last 10 s: 7.2 retransmitted/s  3.10%  12.3k segments/s"
    assert second == "3 peers, by retransmitted  lost events 0  kernel RetransSegs 7, seen 7"
    one = Frame(Table(BAD, [BAD], 1), **_fields(frame()))
    assert render(one, display(80, 24))[1].startswith("1 peer, ")


def test_help_explains_all_columns_and_fits_a_small_screen() -> None:
    titles = render(frame(), display(200, 50))[2].split()
    shown = render(frame(has_help=True), display(80, 24))
    assert all(title in " ".join(shown[2:-2]) for title in titles[1:] if title not in ("LAST", "MINUTE"))
    assert shown[-2] == ""
    assert not [line for line in shown if line.endswith("~")]


def test_the_way_out_is_shown_on_the_narrowest_screen() -> None:
    for shown in (frame(), frame(details=[]), frame(has_help=True)):
        assert "q)uit" in render(shown, display(20, 5))[-1]


def test_foreign_names_cannot_move_the_cursor() -> None:
    assert not [line for line in render(frame(), display(200, 50)) if "\x1b" in line]
    colored = render(frame(), display(200, 50, color=True))
    assert "\x1b[1;31m" in colored[3]
    assert "\x1b[2J" not in "".join(colored)


def test_an_empty_table_says_so() -> None:
    nothing = Table(EVIL, [], 0)
    assert "No traffic yet." in render(Frame(nothing, **_fields(frame())), display(80, 24))[3]
    chosen = Frame(nothing, **{**_fields(frame()), "filter_text": "host web-*"})
    assert "Nothing matches the filter yet." in render(chosen, display(80, 24))[3]


def _fields(shown: Frame) -> dict[str, Any]:
    return {name: getattr(shown, name) for name in Frame.__slots__ if name != "table"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.2"),
        (7, "7"),
        (12.4, "12"),
        (999, "999"),
        (1000, "1.0k"),
        (99_960, "100k"),
        (123_456, "123k"),
        (2e7, "20.0M"),
    ],
)
def test_rates_are_short(value: float, text: str) -> None:
    assert rate(value) == text
    assert len(rate(value)) <= 5


def test_ratios_are_short() -> None:
    assert [percent(each) for each in (None, 0.0, 0.0123, 0.5, 1.0)] == ["-", "0%", "1.23%", "50%", "100%"]


def test_sparklines_show_the_last_minute() -> None:
    assert sparkline([0] * 59 + [8], 20) == " " * 19 + "█"
    assert sparkline([0] * 59 + [8], 20, unicode=False) == " " * 19 + "@"
    assert sparkline([1] * 60, 60) == "█" * 60
    assert sparkline([0] * 60, 20) == " " * 20


def press(*keys: str) -> Choice:
    choice = Choice()
    for key in keys:
        choice = choice.after(key)
    return choice


def test_keys_change_grouping_and_sorting() -> None:
    assert [press(key).by for key in "pfhutcona"] == list(command.GROUPS)
    assert [press(*"s" * count).sort for count in range(len(SORTS) + 1)] == [*SORTS, SORTS[0]]
    assert press("down", "j", "up").selected == 1
    assert press("up").selected == 0
    assert press("page down", "down", "page up").selected == 1
    assert press("page down", "home") == press("home") == press()
    assert press(" ").paused
    assert not press(" ", " ").paused
    assert press("enter").has_details
    assert not press("enter", "escape").has_details
    assert press("?").has_help
    assert press("?", "p", "h").by == "host"
    assert press("enter", "s", "h") == press("enter")
    assert press("q").quits
    assert press("eof").quits


def test_a_selection_follows_its_line_until_the_order_is_changed() -> None:
    assert not press().follows
    assert press("down").follows
    assert press("enter", "escape").follows
    assert not press("down", "up").follows
    for keys in ("s", "h", ("/", "enter")):
        moved = press("down", "down", *keys)
        assert (moved.selected, moved.follows) == (0, False)


def test_a_new_filter_ends_a_pause() -> None:
    assert not press(" ", "/", *"port 22", "enter").paused
    assert press(" ", "/", *"port 22", "escape").paused


def test_a_filter_is_typed_in_place() -> None:
    assert press("/", *"port 22", "enter").filter_text == "port 22"
    assert press("/", *"port 222", "backspace", "enter").filter_text == "port 22"
    assert press("/", *"q").typed == "q"
    assert press("/", *"port 22", "enter", "/", *" or port 23").typed == "port 22 or port 23"
    assert press("/", *"port 22", "enter", "/", "clear").typed == ""
    assert press("/", *"port", "escape").filter_text == ""
    wrong = press("/", *"port x", "enter")
    assert wrong.typed == "port x"
    typed, caret, message = wrong.message.split("\n")
    assert "expected a port" in message
    assert (typed, caret) == ("/port x", "      ^")
    assert press("/", *"  port x", "enter").message == wrong.message
    long = render(frame(message=press("/", *" or ".join(["port 22"] * 20)).message), display(80, 24))[-1]
    assert (long[0], long[-10:], len(long)) == ("~", "r port 22_", 80)
    assert press("/", *"port x", "enter", "backspace", "1", "enter").filter_text == "port 1"


def test_the_options_are_those_of_the_table() -> None:
    assert command.SORTS == tables.SORTS


def test_bytes_of_the_terminal_are_keys() -> None:
    assert _parsed("s\x1b[A\x1bOBq\r\x7f\x1b") == ["s", "up", "down", "q", "enter", "backspace", "escape"]
    assert _parsed("\x1a") == ["suspend"]
    assert _parsed("\x1b[5~\x1b[6~\x1b[H") == ["page up", "page down", "home"]
    assert _parsed("\x1b[15~x\x1b[1;5Cy\x1b[") == ["x", "y"]
