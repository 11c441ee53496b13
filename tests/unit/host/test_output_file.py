"""A command writes its file completely, and replaces neither a folder nor a device."""

import os
from pathlib import Path

import pytest

from producer.host.output_file import write_whole


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("before")
    write_whole(path, b"now", 0o644)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"now", 0o644)
    assert [*tmp_path.iterdir()] == [path]


def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "null"
    path.symlink_to(os.devnull)
    write_whole(path, b"now")
    assert path.is_char_device()
    assert [*tmp_path.iterdir()] == [path]


def test_a_link_stays_as_dev_stdout_is_one_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"longer before")
    (tmp_path / "stdout").symlink_to("file")
    write_whole(tmp_path / "stdout", b"now")
    assert (tmp_path / "stdout").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"now"


def test_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "out", b"now")
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_a_link_that_another_user_has_put_in_place_of_the_partial_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"as it was")
    (tmp_path / f".out.{os.getpid()}.partial").symlink_to("theirs")
    write_whole(tmp_path / "out", b"now")
    assert (tmp_path / "theirs").read_bytes() == b"as it was"
    assert (tmp_path / "out").read_bytes() == b"now"
    assert not (tmp_path / "out").is_symlink()
