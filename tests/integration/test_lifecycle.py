"""How `rebpf run` starts and ends: signals, exit codes, what it holds, and that nothing remains."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support import procfs
from tests.support.programs import program_ids
from tests.support.rebpf import COMPILED, UNUSED_PORT, Run, rebpf, wait_until
from tests.support.traffic import Echo, exchange

pytestmark = pytest.mark.root

NOWHERE = "127.0.0.1:1"
QUIT_NOW = 130


@pytest.fixture(autouse=True)
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile at each first start, as a new producer does."""
    monkeypatch.delenv(COMPILED)


def files(*folders: Path) -> set[str]:
    return {str(path) for folder in folders for path in folder.rglob("*") if path.is_file()}


LEFT_BY_A_STOP = {"lock", "ledger.transmit", "ledger.retransmit", "ledger.flow", "sequence.json"}
LEFT_BY_A_KILL = {*LEFT_BY_A_STOP, "agent.json"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order_and_the_last_line_is_the_balance(tmp_path, number):
    with Echo() as echo, Run(tmp_path, "--port", echo.port) as run:
        run.ready()
        exchange(echo.port, 53)
        balance = run.finish(number)

    assert [json.loads(line) for line in run.output.splitlines()] == [balance]
    assert balance.keys() == {"tcp_transmit", "tcp_retransmit", "tcp_flow"}
    passed = balance["tcp_transmit"]["passed"]
    assert passed > 53 * 16
    assert balance["tcp_transmit"] == {
        "passed": passed, "delivered": passed, "spooled": 0, "in_flight": 0, "in_ring": 0, "carried": 0, "lost": {}
    }  # fmt: skip


def test_without_json_the_last_line_is_the_balance_as_text(tmp_path):
    done = rebpf("run", "--state-dir", tmp_path / "state", "--duration", 0.1, "--port", UNUSED_PORT)

    assert done.returncode == 0
    zero = "passed=0 delivered=0 spooled=0 in_flight=0 lost=0"
    assert done.stdout == f"balance tcp_transmit {zero} | tcp_retransmit {zero} | tcp_flow {zero}\n"


def test_it_ends_by_itself_after_its_duration(tmp_path):
    with Run(tmp_path, "--duration", 0.2) as run:
        assert run.finish(None)["tcp_transmit"]["in_flight"] == 0


@pytest.mark.parametrize("spool", [True, False])
def test_undelivered_events_go_to_disk_or_are_lost_without_a_spool(tmp_path, spool):
    config = "kafka.stop_timeout_s = 0.5\n" + ("" if spool else "spool.transmit_bytes = 0\n")
    with Echo() as echo:
        arguments = ["--brokers", NOWHERE, "--port", echo.port]
        with Run(tmp_path, *arguments, config=config) as run:
            run.ready()
            exchange(echo.port, 11)
            balance = run.finish()["tcp_transmit"]

    assert balance["passed"] > 11 * 16
    assert balance["spooled"] == (balance["passed"] if spool else 0)
    assert balance["lost"] == ({} if spool else {"stopped": balance["passed"]})
    assert balance["in_flight"] == balance["delivered"] == balance["in_ring"] == 0


def test_a_second_signal_ends_it_at_once(tmp_path):
    with Echo() as echo:
        arguments = ["--brokers", NOWHERE, "--port", echo.port]
        with Run(tmp_path, *arguments, config="kafka.stop_timeout_s = 600.0\nspool.spill_after_s = 600.0") as run:
            run.ready()
            exchange(echo.port, 11)
            assert procfs.bpf_ids(run.pid, "link")
            run.send(signal.SIGTERM)
            wait_until("the hooks are detached", lambda: not procfs.bpf_ids(run.pid, "link"))
            run.send(signal.SIGTERM)
            assert run.wait() == QUIT_NOW

    assert run.output == ""


def test_kill_leaves_no_program_no_process_and_no_file_and_the_next_start_works(tmp_path):
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    env = {"HOME": str(home), "TMPDIR": str(temporary)}
    folder = tmp_path / "run"
    with Echo() as echo:
        with Run(folder, "--port", echo.port, env=env) as run:
            run.ready()
            exchange(echo.port, 3)
            programs = procfs.bpf_ids(run.pid, "prog")
            assert programs <= program_ids()
            assert procfs.bpf_ids(run.pid, "link")
            assert not procfs.children(run.pid)
            run.kill()

        wait_until("the programs are gone", lambda: not programs & program_ids())
        (compiled,) = (folder / "state" / "compiled").iterdir()
        assert files(folder / "state") == {str(compiled), *(str(folder / "state" / name) for name in LEFT_BY_A_KILL)}
        assert files(home, temporary) == set()
        assert {path.name for path in folder.iterdir()} == {"state", "rebpf.toml", "out", "err"}

        with Run(folder, "--port", echo.port, env=env) as run:
            run.ready()
            exchange(echo.port, 3)
            assert "cached=true" in run.log
            balance = run.finish()["tcp_transmit"]
    assert balance["delivered"] == balance["passed"] > 0
    assert files(folder / "state") == {str(compiled), *(str(folder / "state" / name) for name in LEFT_BY_A_STOP)}


def test_kill_while_it_loads_takes_the_loader_with_it(tmp_path):
    with Run(tmp_path) as run:
        (loader,) = wait_until("the loader runs", lambda: procfs.children(run.pid, "producer.kernel.loader_child"))
        end = os.pidfd_open(loader)
        try:
            run.kill()
            assert procfs.ends(end)
        finally:
            os.close(end)


def test_a_second_producer_with_the_state_folder_exits_with_the_pid_of_the_first(tmp_path):
    with Run(tmp_path, "--port", UNUSED_PORT) as run:
        run.ready()
        second = rebpf("run", "--state-dir", run.state_dir)
        assert second.returncode == 75
        assert second.stderr == f"rebpf: another producer runs with state_dir {run.state_dir}: pid {run.pid}\n"
        assert run.finish()["tcp_transmit"]["in_flight"] == 0


def test_no_thread_keeps_a_capability(tmp_path):
    with Run(tmp_path, "--port", UNUSED_PORT) as run:
        run.ready()
        capabilities = procfs.capabilities(run.pid)
        run.finish()

    assert {name: capabilities[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {
        "CapEff": {0}, "CapPrm": {0}, "CapInh": {0}, "CapAmb": {0}
    }  # fmt: skip
