"""The descriptor store, as systemd and the service's next process see it."""

import os
import resource
import sys

import pytest

from producer.errors import ConfigError
from producer.host.systemd import barrier, notify
from producer.kernel.fdstore import FdStore, available
from tests.support.fake_systemd import Manager

NEXT = """
import os, sys
from producer.kernel.fdstore import FdStore
if sys.argv[1:]:
    os.environ["LISTEN_PID"] = sys.argv[1]
with FdStore() as store:
    print(store.manifest())
    if store.manifest():
        print(*(os.read(descriptor, 100).decode() for descriptor in store.open(["ring", "link_0"])))
print([name for name in os.environ if name.startswith("LISTEN_")])
print([number for number in range(3, 6) if os.path.exists(f"/proc/self/fd/{number}")])
"""
MANIFEST = {"maps": ["ring"], "links": ["link_0"]}


@pytest.fixture
def manager(tmp_path, monkeypatch):
    with Manager(tmp_path) as manager:
        for name, value in manager.environment.items():
            monkeypatch.setenv(name, value)
        yield manager


@pytest.fixture
def objects(tmp_path):
    """Distinguishable descriptors."""
    found = {}
    for name in ("ring", "link_0"):
        (tmp_path / name).write_text(f"this is {name}")
        found[name] = os.open(tmp_path / name, os.O_RDONLY)
    yield found
    for descriptor in found.values():
        os.close(descriptor)


def next_process(manager, *arguments):
    process = manager.start([sys.executable, "-c", NEXT, *arguments], stdout=-1)
    out, _ = process.communicate()
    assert process.returncode == 0
    return out.splitlines()


def removed(manager):
    return [text.split("FDNAME=")[1] for text in manager.messages if text.startswith("FDSTOREREMOVE=1\n")]


def test_the_next_process_finds_the_stored_objects_and_its_children_do_not(manager, objects):
    with FdStore() as store:
        assert store.manifest() is None
        store.save(objects, MANIFEST)
    assert next_process(manager) == [str(MANIFEST), "this is ring this is link_0", "[]", "[]"]


def test_descriptors_passed_to_another_process_are_ignored(manager, objects):
    with FdStore() as store:
        store.save(objects, MANIFEST)
    assert next_process(manager, "1") == ["None", "[]", "[3, 4, 5]"]


def test_the_manifest_is_stored_last_and_cannot_be_changed(manager, objects):
    with FdStore() as store:
        store.save(objects, MANIFEST)
        names = [text.split("\n")[1] for text in manager.messages if text.startswith("FDSTORE=1\n")]
        assert names == ["FDNAME=ring", "FDNAME=link_0", "FDNAME=manifest_1"]
        assert all("\nFDPOLL=0" in text for text in manager.messages if text.startswith("FDSTORE=1\n"))
        assert store.manifest() == MANIFEST
        with pytest.raises(PermissionError):
            os.write(manager.stored["manifest_1"], b"{}")


def test_children_do_not_inherit_the_descriptors(manager, objects):
    with FdStore() as store:
        store.save(objects, MANIFEST)
    look = "import os\nfrom producer.kernel.fdstore import FdStore\n"
    look += "with FdStore(): print(*map(os.get_inheritable, (3, 4, 5)))"
    process = manager.start([sys.executable, "-c", look], stdout=-1)
    assert process.communicate()[0].split() == ["False"] * 3


def test_the_manifest_is_removed_first_and_then_the_links(manager, objects):
    with FdStore() as store:
        store.save(objects, MANIFEST)
        store.clear()
        assert removed(manager) == ["manifest_1", "link_0", "ring"]
        assert manager.stored == {}
        assert store.manifest() is None


def test_saving_again_replaces_the_old_objects(manager, objects):
    with FdStore() as store:
        store.save(objects, MANIFEST)
        store.save({"ring": objects["ring"]}, {"maps": ["ring"]})
        assert sorted(manager.stored) == ["manifest_2", "ring"]
        assert store.manifest() == {"maps": ["ring"]}
        assert removed(manager) == ["manifest_1", "link_0"]
        stored = [text for text in manager.messages if text.startswith("FDSTORE=1\n")]
        assert sum("FDNAME=ring" in text for text in stored) == 1, "a name stands for one object forever"


@pytest.mark.parametrize("killed_before", ["FDSTORE=1\nFDNAME=manifest_2", "FDSTOREREMOVE=1\nFDNAME=manifest_1"])
def test_a_process_killed_while_saving_leaves_the_old_or_the_new_objects(manager, objects, monkeypatch, killed_before):
    def send(text, descriptors=()):
        if text.startswith(killed_before):
            raise KeyboardInterrupt
        return notify(text, descriptors)

    with FdStore() as store:
        store.save(objects, MANIFEST)
        monkeypatch.setattr("producer.kernel.fdstore.notify", send)
        with pytest.raises(KeyboardInterrupt):
            store.save({"other": objects["ring"]}, {"maps": ["other"]})
    barrier()  # systemd processes a process's messages before its exit
    look = "from producer.kernel.fdstore import FdStore\nwith FdStore() as store: print(store.manifest())"
    process = manager.start([sys.executable, "-c", look], stdout=-1)
    is_old = "manifest_2" in killed_before
    assert process.communicate()[0] == f"{MANIFEST if is_old else {'maps': ['other']}}\n"
    assert sorted(manager.stored) == (["link_0", "manifest_1", "ring"] if is_old else ["manifest_2", "other"])


def test_an_unreadable_manifest_is_empty(manager, objects, tmp_path):
    with FdStore() as store:
        store.save(objects, MANIFEST)
    manager.forget("manifest_1")
    manager.stored["manifest_1"] = os.open(tmp_path / "ring", os.O_RDONLY)
    look = "from producer.kernel.fdstore import FdStore\n"
    look += "with FdStore() as store: print(store.manifest()); store.save({}, {})"
    process = manager.start([sys.executable, "-c", look], stdout=-1)
    assert process.communicate()[0] == "{}\n"
    assert list(manager.stored) == ["manifest_2"]


def test_leftovers_without_a_manifest_are_cleared(manager, objects):
    with FdStore() as store:
        store.save(objects, MANIFEST)
    manager.forget("manifest_1")
    look = "from producer.kernel.fdstore import FdStore\nwith FdStore() as store: print(store.manifest())"
    process = manager.start([sys.executable, "-c", look], stdout=-1)
    assert process.communicate()[0] == "None\n"
    assert manager.stored == {}


def test_a_store_that_is_too_small_is_a_configuration_error(manager, objects, monkeypatch):
    monkeypatch.setenv("FDSTORE", "2")
    with FdStore() as store, pytest.raises(ConfigError, match="FileDescriptorStoreMax=2 of the unit is too small: 3"):
        store.save(objects, MANIFEST)
    assert manager.messages == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"NOTIFY_SOCKET": "/run/systemd/notify"}, False),
        ({"NOTIFY_SOCKET": "/run/systemd/notify", "FDSTORE": "0"}, False),
        ({"NOTIFY_SOCKET": "/run/systemd/notify", "FDSTORE": "64"}, True),
        ({"FDSTORE": "64"}, False),
    ],
)
def test_a_store_is_found_if_the_unit_has_one(environment, expected, monkeypatch):
    for name in ("NOTIFY_SOCKET", "FDSTORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert available() is expected


def test_if_descriptors_run_out_none_stays_open(manager, objects):
    with FdStore() as store:
        store.save(objects, MANIFEST)
        lowest = os.dup(0)
        os.close(lowest)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, before[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                store.open(["ring", "link_0"])
            now_lowest = os.dup(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(now_lowest)
        assert now_lowest == lowest
