"""Cgroups have the path of their folder, and the path tells whose they are."""

import itertools
import os
from pathlib import Path

import pytest

from producer.host.cgroups import CgroupPaths, cgroup2_root, container, pod_uid, unit
from tests.support.names import raw_name
from tests.support.procfs import without_descriptors

ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/system.slice/nginx.service", ("nginx.service", None)),
        ("/system.slice/nginx.service/worker", ("nginx.service", None)),
        ("/user.slice/user-1000.slice/session-3.scope", ("session-3.scope", None)),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/sshd.service", ("user@1000.service", None)),
        ("/home/sshd.service", (None, None)),
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


UID = "8f4e4a9c-6c6a-4c5c-9e57-0d7ad0d4f2aa"
SLICE = UID.replace("-", "_")
STATIC = "2d5cdc1fd6a49ed7ab7d0b2ba5bd1eb6"
OTHER = "f" * 8 + UID[8:]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        # containerd, CRI-O, cri-dockerd, with the systemd driver
        (f"/kubepods.slice/kubepods-pod{SLICE}.slice/cri-containerd-{ID}.scope", UID),
        (f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SLICE}.slice/crio-{ID}.scope", UID),
        (f"/kubepods.slice/kubepods-pod{SLICE}.slice/crio-{ID}.scope/container", UID),
        (f"/kubepods.slice/kubepods-pod{SLICE}.slice/docker-{ID}.scope", UID),
        (f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/crio-{ID}.scope", STATIC),
        # the same, with the cgroupfs driver
        (f"/kubepods/besteffort/pod{UID}/{ID}", UID),
        (f"/kubepods/burstable/pod{UID}/crio-{ID}", UID),
        (f"/kubepods/pod{UID}/{ID}/init.scope", UID),
        (f"/kubepods/burstable/pod{STATIC}/{ID}", STATIC),
        (f"/kubelet/kubepods/pod{UID}/{ID}", UID),
        # the kubelet's driver is systemd, containerd's is cgroupfs
        (f"/system.slice/containerd.service/kubepods-burstable-pod{SLICE}.slice:cri-containerd:{ID}", UID),
        # kind: nodes are containers
        (
            f"/system.slice/docker-{'b' * 64}.scope/kubelet.slice/kubelet-kubepods.slice/"
            f"kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{SLICE}.slice/cri-containerd-{ID}.scope",
            UID,
        ),
        # the innermost of nested pods
        (f"/kubepods/pod{OTHER}/{'b' * 64}/kubepods/pod{UID}/{ID}", UID),
    ],
)
def test_a_pods_path_names_its_uid_and_container(path: str, expected: str) -> None:
    assert (pod_uid(path), container(path)) == (expected, ID)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/system.slice/kubelet.service",
        f"/system.slice/docker-{ID}.scope",
        f"/machine.slice/machine-libpod_pod_{ID}.slice/libpod-{ID}.scope",
        f"/user.slice/pod{UID}",
        f"/kubepods/burstable/pod{UID}0",
        f"/kubepods/burstable/xpod{UID}",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE}.scope",
        "/kubepods/burstable/pod1",
        "/kubepods.slice",
    ],
)
def test_other_paths_name_no_pod(path: str) -> None:
    assert pod_uid(path) is None


def mount(path: bytes, kind: bytes, source: bytes = b"s", part: bytes = b"/") -> bytes:
    """Return a line of /proc/self/mountinfo."""
    return b"40 25 0:26 %s %s rw,nosuid shared:9 - %s %s rw\n" % (part, path, kind, source)


OURS = mount(b"/sys/fs/cgroup", b"cgroup2")


@pytest.mark.parametrize(
    "mounted_by_a_user",
    [
        mount(b"/home/u/caf\xe9", b"fuse.sshfs"),
        mount("/home/u/\u2028".encode(), b"fuse.sshfs"),
        mount("/home/u/\x85none\xa0/home/u/fake\xa0-\xa0cgroup2\xa0rw".encode(), b"fuse.sshfs"),
        mount(b"/home/u/fake", b"fuse.cgroup2", b"cgroup2"),
        mount(b"/home/u/\\012/\\040/home/u/fake\\040-\\040cgroup2\\040rw", b"fuse.sshfs", b"\\040-\\040cgroup2\\040"),
        mount(b"/\x0b\x0c\x1c\x00\r", b"fuse.sshfs"),
    ],
)
def test_no_mount_by_a_user_hides_or_replaces_the_cgroup_root(mounted_by_a_user: bytes, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_bytes(mounted_by_a_user + OURS)
    assert cgroup2_root(mounts) == Path("/sys/fs/cgroup")
    mounts.write_bytes(mounted_by_a_user)
    assert cgroup2_root(mounts) is None


def test_the_cgroup_root_can_have_any_name(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_bytes(mount(b"/proc", b"proc") + mount(b"/mnt/caf\xc3\xa9\xe9\\040\\134x", b"cgroup2"))
    root = cgroup2_root(mounts)
    assert root is not None
    assert os.fsencode(root) == b"/mnt/caf\xc3\xa9\xe9 \\x"


@pytest.mark.parametrize("part", [b"/system.slice", b"/a/b", b"/.."])
def test_the_mount_with_the_most_of_the_hierarchy_is_the_cgroup_root(tmp_path: Path, part: bytes) -> None:
    """Others are bind mounts; in a cgroup namespace, those of the host have "..", and more."""
    mounts = tmp_path / "mounts"
    another = mount(b"/mnt/part", b"cgroup2", part=part)
    expected = Path("/mnt/part" if b".." in part else "/sys/fs/cgroup")
    for text in (another + OURS, OURS + another):
        mounts.write_bytes(text)
        assert cgroup2_root(mounts) == expected


class Clock:
    """A clock on which each look at it takes a moment."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def test_a_cgroup_keeps_its_path_when_it_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "a.slice" / "b.service"
    folder.mkdir(parents=True)
    paths = CgroupPaths(tmp_path, clock := Clock(), cpu_clock=clock)
    number = folder.stat().st_ino
    assert paths.path(number) == "/a.slice/b.service"
    assert paths.path(tmp_path.stat().st_ino) == "/"
    folder.rmdir()
    assert paths.path(number) == "/a.slice/b.service"


def test_a_cgroup_that_came_later_is_found_and_one_that_never_was_is_not(tmp_path: Path) -> None:
    paths = CgroupPaths(tmp_path, clock := Clock(), cpu_clock=clock)
    assert paths.path(1) is None
    (tmp_path / "late").mkdir()
    assert paths.path((tmp_path / "late").stat().st_ino) == "/late"
    assert CgroupPaths(None).path(1) is None


def test_a_cgroup_that_no_descriptor_is_left_to_look_for_is_found_later(tmp_path: Path) -> None:
    (tmp_path / "a.service").mkdir()
    number = (tmp_path / "a.service").stat().st_ino
    paths = CgroupPaths(tmp_path, clock := Clock(), cpu_clock=clock)
    with without_descriptors():
        assert paths.path(number) is None
        paths.look_up()
    assert paths.path(number) == "/a.service"


def test_a_name_may_have_any_bytes(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9\n%\x1b[2J.service"
    os.mkdir(folder)
    paths = CgroupPaths(tmp_path, clock := Clock(), cpu_clock=clock)
    path = paths.path(os.stat(folder).st_ino)
    assert path == "/caf%E9%0A%25%1B[2J.service"
    assert raw_name(path) == b"/caf\xe9\n%\x1b[2J.service"


def test_lookups_of_many_cgroups_are_short_and_rare_and_continue_where_they_were(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"run{number}" / "a").mkdir(parents=True)
    wanted = (tmp_path / "run137" / "a").stat().st_ino
    clock = Clock(step_s=0.001)
    paths = CgroupPaths(tmp_path, clock, cpu_clock=clock)
    looks, found = 0, None
    while found is None and looks < 1000:
        looks += 1
        before_s = clock.now_s
        found = paths.path(wanted)
        assert clock.now_s - before_s < 0.02
        clock.now_s += 0.2
    assert looks > 10
    assert found == "/run137/a"


def test_cgroups_that_come_and_go_do_not_stop_a_lookup(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"run{number}" / "a").mkdir(parents=True)
    wanted = (tmp_path / "run49" / "a").stat().st_ino
    clock = Clock(step_s=0.001)
    paths = CgroupPaths(tmp_path, clock, cpu_clock=clock)
    number = 0
    while paths.path(wanted) is None and number < 49:
        (tmp_path / f"run{number}" / "a").rmdir()
        (tmp_path / f"run{number}").rmdir()
        number += 1
        clock.now_s += 1
    for _ in range(1000):
        paths.look_up()
        clock.now_s += 1
    assert paths.path(wanted) == "/run49/a"


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(20)]
    for folder in folders:
        folder.mkdir()
    paths = CgroupPaths(tmp_path, clock := Clock(), max_cached=5, cpu_clock=clock)
    numbers = [folder.stat().st_ino for folder in folders]
    assert [paths.path(number) for number in numbers] == [f"/{number}" for number in range(20)]
    for folder in folders:
        folder.rmdir()
    assert [paths.path(number) for number in numbers[-5:]] == [f"/{number}" for number in range(15, 20)]
    assert paths.path(numbers[0]) is None


def test_a_lookup_in_one_large_folder_is_as_short_as_in_many_folders(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number}").mkdir()
    now = [0.0]

    def clock() -> float:
        now[0] += 0.003
        return now[0]

    paths = CgroupPaths(tmp_path, clock, cpu_clock=lambda: 0.0)
    ids = [(tmp_path / f"{number}").stat().st_ino for number in range(1000)]
    for each in ids:
        paths.path(each)
    found = []
    while paths.found < 1000:
        now[0] += 10
        paths.look_up()
        found.append(paths.found)
    assert max(after - before for before, after in itertools.pairwise([0, *found])) <= 2 * 256
    assert [paths.path(each) for each in ids] == [f"/{number}" for number in range(1000)]


def test_one_walk_finds_all_ids_that_are_asked_for_together(tmp_path: Path) -> None:
    ids = []
    for number in range(10):
        (tmp_path / f"{number}").mkdir()
        ids.append((tmp_path / f"{number}").stat().st_ino)
    ticks = itertools.count()
    paths = CgroupPaths(tmp_path, lambda: next(ticks) / 10_000)
    paths.look_up(ids)
    assert [paths.path(each) for each in ids] == [f"/{number}" for number in range(10)]
