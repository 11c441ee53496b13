"""Cgroups have the path of their folder, and the path tells whose they are."""

from pathlib import Path

import pytest

from producer.cgroups import CgroupPaths, container, unit

ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/system.slice/nginx.service", ("nginx.service", None)),
        ("/system.slice/nginx.service/worker", ("nginx.service", None)),
        ("/user.slice/user-1000.slice/session-3.scope", ("session-3.scope", None)),
        ("/", (None, None)),
        ("/some/folder", (None, None)),
        (f"/docker/{ID}", (None, ID)),
        (f"/system.slice/docker-{ID}.scope", (f"docker-{ID}.scope", ID)),
        (f"/kubepods.slice/pod1.slice/cri-containerd-{ID}.scope/init", (f"cri-containerd-{ID}.scope", ID)),
        (f"/machine.slice/libpod-{ID}.scope", (f"libpod-{ID}.scope", ID)),
        (f"/x/{ID[:-1]}", (None, None)),
    ],
)
def test_a_path_names_a_unit_and_a_container(path: str, expected: tuple[str | None, str | None]) -> None:
    assert (unit(path), container(path)) == expected


def test_a_cgroup_keeps_its_path_when_it_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "a.slice" / "b.service"
    folder.mkdir(parents=True)
    paths = CgroupPaths(tmp_path)
    number = folder.stat().st_ino
    assert paths.path(number) == "/a.slice/b.service"
    assert paths.path(tmp_path.stat().st_ino) == "/"
    folder.rmdir()
    assert paths.path(number) == "/a.slice/b.service"


def test_a_cgroup_that_came_later_is_found_and_one_that_never_was_is_not(tmp_path: Path) -> None:
    paths = CgroupPaths(tmp_path)
    assert paths.path(1) is None
    (tmp_path / "late").mkdir()
    assert paths.path((tmp_path / "late").stat().st_ino) == "/late"
    assert CgroupPaths(None).path(1) is None
