"""Where a setting is: each way to write one in TOML is found, and what is nowhere has no line."""

from pathlib import Path

import pytest

from producer.config.locate import Source, find

TEXT = """\
host = "a" # [kafka]
spool.keep = "x"

[ capture ] # all of it
ports = [1]

["kafka"."settings"]
"linger.ms" = 5
[[rules]]
port = [1]
[[rules]]
[metrics]
registry = { url = "x" }
"""
SOURCE = Source(Path("rebpf.toml"), TEXT, {"rules": range(2)})


@pytest.mark.parametrize(
    ("message", "number"),
    [
        ("host: expected a string", 1),
        ("unknown key spool.keep", 2),
        ("capture: expected a table, [capture]", 4),
        ("unknown key capture.prots: did you mean ports?", 4),
        ("capture.ports: expected a port", 5),
        ("kafka.settings.linger.ms: expected a string", 8),
        ("rules[1].port: expected a list", 10),
        ("rules[2].port: expected a list", 11),
        ("rules and a filter cannot be combined", 9),
        ("rule 2 web: '99-1' is no port", 11),
        ("metrics.registry.url: no", 13),
    ],
)
def test_the_line_of_a_message(message: str, number: int) -> None:
    assert find([SOURCE], message) == (SOURCE, number)


@pytest.mark.parametrize("message", ["an action is keep or drop", "state_dir: expected a string", ""])
def test_settings_that_the_file_lacks_have_no_line(message: str) -> None:
    assert find([SOURCE], message) is None


@pytest.mark.parametrize("line", ["#", "[", "a", '"', "a.", ""])
def test_a_line_of_any_length_is_read_in_linear_time(line: str) -> None:
    text = f"{line}{' ' * 1_000_000}\nhost = 1\n"
    source = Source(Path("rebpf.toml"), text, {})
    assert find([source], "host: expected a string") == (source, 2)
    assert find([source], f"unknown key {'a.' * 500_000}") is None
