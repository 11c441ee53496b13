"""conf.d: how files are merged, and that each message names the file and line that its value came from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from producer.config import sources
from producer.config.load import Config, load
from producer.errors import ConfigError

Read = Callable[..., Config]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(main: str, **fragments: str) -> Config:
        (tmp_path / "conf.d").mkdir()
        (tmp_path / "rebpf.toml").write_text(main)
        for name, text in fragments.items():
            (tmp_path / "conf.d" / f"{name}.toml").write_text(text)
        return load(tmp_path / "rebpf.toml")

    return read


def test_later_files_replace_values_and_keep_the_others(read: Read) -> None:
    config = read(
        '[kafka]\nbrokers = "a:1"\nkey = "flow"\n'
        'settings = { "linger.ms" = 1, "client.id" = "x" }\n[capture]\nports = [1]',
        b='kafka.settings."linger.ms" = 3',
        a='[kafka]\nbrokers = "b:1"\nsettings = { "linger.ms" = 2 }\n[capture]\nports = [2, 3]',
    )
    assert (config.kafka.brokers, config.kafka.key, config.capture.ports) == ("b:1", "flow", (2, 3))
    assert config.kafka.settings == {"linger.ms": "3", "client.id": "x"}


def test_lists_of_tables_are_joined_in_the_order_of_the_files(read: Read) -> None:
    config = read(
        '[[rules]]\nname = "1"\n[[alert.rules]]\nname = "x"\n',
        b='[[rules]]\nname = "3"\n[[rules]]\nname = "4"\n',
        a='rules = [{ name = "2" }]\n[[alert.rules]]\nname = "y"\n',
    )
    assert [rule.name for rule in config.rules] == ["1", "2", "3", "4"]
    assert [rule.name for rule in config.alert.rules] == ["x", "y"]


def test_other_files_are_not_read(tmp_path: Path, read: Read) -> None:
    (tmp_path / "conf.d").mkdir()
    for name in (".10.toml", ".#10.toml", "10.toml~", "10.toml.bak", "README"):
        (tmp_path / "conf.d" / name).write_text("nonsense")
    (tmp_path / "rebpf.toml").write_text('host = "a"')
    assert load(tmp_path / "rebpf.toml").host == "a"


@pytest.mark.parametrize(
    ("main", "first", "second", "message"),
    [
        ("[kafka]", '\n[kafka]\nkey = "no"', "", r"conf\.d/a\.toml: line 3: kafka\.key: expected"),
        ('[kafka]\nkey = "no"', '[kafka]\nbrokers = "a:1"', "[kafka]", r"rebpf\.toml: line 2: kafka\.key: expected"),
        ('[kafka]\nkey = "no"', '[kafka]\nkey = "nope"', "", r"conf\.d/a\.toml: line 2: kafka\.key: .*'nope'"),
        ("[kafka]", "", "[kafka]\nkez = 1", r"conf\.d/b\.toml: line 2: unknown key kafka\.kez: did you mean key"),
        ("[[rules]]", "[[rules]]", "\n[[rules]]\nport = [0, 99999]", r"conf\.d/b\.toml: line 3: rules\[3\]\.port"),
        ("[[rules]]\nport = [99999]", "[[rules]]\nport = [1]", "", r"rebpf\.toml: line 2: rules\[1\]\.port"),
        ("[[rules]]", "rules = [{ sample = 0 }]", "[[rules]]", r"conf\.d/a\.toml: line 1: rules\[2\]\.sample"),
        ("[spool]", "spool = 1", "", r"conf\.d/a\.toml: line 1: spool: expected a table"),
        ("", "x = = 1", "", r"conf\.d/a\.toml: .*line 1"),
        ("", "", "x = 99999999999999999999", r"conf\.d/b\.toml: line 1: x: expected an integer of at most 64 bits"),
        ('host = "a"', "", '[kafka.settings]\n"acks" = 1', r"conf\.d/b\.toml: line 2: kafka\.settings\.acks"),
        (
            "",
            "",
            '[kafka.settings]\n"sasl.password" = "@/no"',
            r"b\.toml: line 2: kafka\.settings\.sasl\.password",
        ),
    ],
)
def test_a_message_names_the_file_and_line(read: Read, main: str, first: str, second: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(main, a=first, b=second)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "rebpf.toml").write_text("")
    (tmp_path / "conf.d" / "a.toml").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"conf\.d/a\.toml: expected a regular file"):
        load(tmp_path / "rebpf.toml")
    (tmp_path / "conf.d" / "a.toml").rmdir()
    (tmp_path / "conf.d" / "a.toml").symlink_to("missing")
    with pytest.raises(ConfigError, match=r"conf\.d/a\.toml: No such file"):
        load(tmp_path / "rebpf.toml")


def test_a_conf_d_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "rebpf.toml").write_text("")
    (tmp_path / "conf.d").symlink_to("missing")
    with pytest.raises(ConfigError, match=r"conf\.d: No such file"):
        load(tmp_path / "rebpf.toml")
    (tmp_path / "conf.d").unlink()
    (tmp_path / "conf.d").write_text("")
    with pytest.raises(ConfigError, match=r"conf\.d: Not a directory"):
        load(tmp_path / "rebpf.toml")


def test_the_number_of_files_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "rebpf.toml").write_text("")
    (tmp_path / "conf.d").mkdir()
    for number in range(257):
        (tmp_path / "conf.d" / f"{number}.toml").write_text("")
    with pytest.raises(ConfigError, match=r"conf\.d: expected at most 256 files, found 257"):
        load(tmp_path / "rebpf.toml")


def test_a_changed_added_replaced_or_removed_file_is_seen(tmp_path: Path) -> None:
    path, added = tmp_path / "rebpf.toml", tmp_path / "conf.d" / "a.toml"
    states = [sources.state(path)]

    def step() -> None:
        states.append(sources.state(path))
        assert states[-1] != states[-2]
        assert sources.state(path) == states[-1]

    path.write_text("")
    step()
    path.write_text("x")
    step()
    added.parent.mkdir()
    added.write_text("y")
    step()
    (tmp_path / "new").write_text("z")
    (tmp_path / "new").rename(added)
    step()
    added.unlink()
    step()
