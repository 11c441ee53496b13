"""Rule changes while the producer runs: by `rebpf reload`, SIGHUP, a bad file, and a new cgroup."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from producer.host.cgroups import cgroup2_root
from tests.support.rebpf import Run, rebpf, wait_until
from tests.support.traffic import Echo, exchange
from tests.support.wire import captured

pytestmark = pytest.mark.root


def only(port: int, *more: str) -> str:
    return "\n".join(['[capture]\ndefault = "drop"\n[[rules]]', f"port = [{port}]", *more])


def test_reload_puts_the_changed_rules_in_force(tmp_path: Path) -> None:
    with Echo() as one, Echo() as other, Run(tmp_path, config=only(one.port)) as run:
        run.ready()
        with captured(one.port) as segments:
            exchange(one.port, 3)
        exchange(other.port, 5)
        run.config.write_text(only(other.port))
        done = rebpf("reload", "--config", run.config, "--state-dir", run.state_dir)
        assert (done.returncode, done.stdout) == (0, "rules version 2 is in force\n")
        exchange(one.port, 7)
        balance = run.finish()
    # Three connections before the reload; none of the five, nor of the seven after it.
    assert balance["tcp_transmit"]["delivered"] == balance["tcp_transmit"]["passed"] == segments.total() > 3 * 16


def test_a_bad_file_changes_nothing_and_says_why(tmp_path: Path) -> None:
    with Echo() as echo, Run(tmp_path, config=only(echo.port)) as run:
        run.ready()
        run.config.write_text(only(echo.port, 'uuid = ["root"]'))
        done = rebpf("reload", "--config", run.config, "--state-dir", run.state_dir)
        assert done.returncode == 78
        assert "line 5: unknown key rules[1].uuid: did you mean uid?" in done.stderr
        run.send(signal.SIGHUP)
        run.wait_for(r"reload refused: .* line 5: unknown key rules\[1\]\.uuid.*version=1 stays in force")
        exchange(echo.port, 3)
        assert run.finish()["tcp_transmit"]["passed"] > 0


@pytest.mark.parametrize("wrong", ["uid = [-1]", "netns = [-1]", "interface = [8589934592]", "sample = 1099511627776"])
def test_a_number_out_of_range_in_a_reload_changes_nothing(tmp_path: Path, wrong: str) -> None:
    with Run(tmp_path, config="[[rules]]") as run:
        run.ready()
        run.config.write_text(f'state_dir = "{run.state_dir}"\n[[rules]]\n{wrong}\n')
        codes = [rebpf(*words, "--config", run.config).returncode for words in (("reload",), ("check", "--local"))]
        assert codes == [78, 78]
        run.send(signal.SIGHUP)
        run.wait_for(r"reload refused: .* line 3: rules\[1\]\..*version=1 stays in force")
        run.finish()


def test_settings_that_do_not_fit_this_host_are_refused_with_file_and_line(tmp_path: Path) -> None:
    expected = r"rebpf\.toml: line 4: rule 2: /no/such/file: No such file"
    with Run(tmp_path, config=only(443)) as run:
        run.ready()
        run.config.write_text('[[rules]]\nname = "all"\n\n[[rules]]\naddress = ["@/no/such/file"]\n')
        done = rebpf("reload", "--state-dir", run.state_dir)  # as in the unit
        assert done.returncode == 78
        assert re.search(f"rejects the configuration: .*{expected}", done.stderr)
        run.wait_for(f"reload refused: .*{expected}")
        run.finish()
    done = rebpf("run", "--config", run.config, "--state-dir", run.state_dir)
    assert done.returncode == 78
    assert re.search(expected, done.stderr)
    run.config.write_text('\n[kafka.settings]\n"sasl.pasword" = "x"\n')
    done = rebpf("run", "--config", run.config, "--state-dir", run.state_dir)
    assert done.returncode == 78
    assert "rebpf.toml: line 3: kafka.settings.sasl.pasword: No such configuration property" in done.stderr


def test_a_changed_ring_size_needs_a_restart_and_other_settings_apply(tmp_path: Path) -> None:
    config = only(443, '[metrics]\nlisten = "127.0.0.1:0"')
    with Run(tmp_path, config=config) as run:
        run.ready()
        (run.config.parent / "conf.d").mkdir()
        site = run.config.parent / "conf.d" / "site.toml"
        site.write_text("[capture]\ntransmit_ring_bytes = 65536\nlatency_s = 0.5\n")
        done = rebpf("reload", "--config", run.config, "--state-dir", run.state_dir)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == (
            "rules version 2 is in force\nthese changed settings need a restart: capture.transmit_ring_bytes\n"
        )
        run.wait_for(r"changed settings need a restart: capture\.transmit_ring_bytes")
        wanted = json.loads(rebpf("config", "--config", run.config, "--state-dir", run.state_dir, "--json").stdout)
        report = json.loads(rebpf("status", "--state-dir", run.state_dir, "--json").stdout)
        assert report["restart_needed"] == ["capture.transmit_ring_bytes"]
        assert report["config_hash"] != wanted["hash"], "the files are ahead"
        run.finish()


def test_without_a_producer_there_is_nothing_to_reload(tmp_path: Path) -> None:
    done = rebpf("reload", "--state-dir", tmp_path)
    assert done.returncode == 69
    assert "no producer is running" in done.stderr


def test_a_cgroup_that_appears_is_followed(tmp_path: Path) -> None:
    root = cgroup2_root()
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("no writable cgroup v2 hierarchy is mounted")
    folder = root / f"rebpf-test-{os.getpid()}"
    config = f'[capture]\ndefault = "drop"\n[[rules]]\ncgroup = ["/{folder.name}"]\n'
    client = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1]))).close()"
    with Echo() as echo, Run(tmp_path, config=config) as run:
        run.ready()
        folder.mkdir()
        try:
            run.wait_for(r"rules updated: what they name has changed version=2")
            move = f"import os; open({str(folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
            subprocess.run([sys.executable, "-c", move + client, str(echo.port)], check=True)
            balance = run.finish()
        finally:
            wait_until("the cgroup is empty", lambda: not (folder / "cgroup.procs").read_text())
            folder.rmdir()
    assert balance["tcp_transmit"]["passed"] in (3, 4), "SYN, ACK, FIN and perhaps the last ACK; not the server's side"


def test_explain_names_the_rule(tmp_path: Path) -> None:
    config = tmp_path / "rebpf.toml"
    config.write_text(only(443))
    done = rebpf("check", "--config", config, "--explain", "10.0.0.1:443,10.0.0.2:5000")
    assert (done.returncode, done.stdout) == (0, "rule 1 decides: transmits kept, retransmits kept, flows kept\n")


def test_50_reloads_under_traffic_leave_no_gap(tmp_path: Path) -> None:
    done = threading.Event()
    with Echo() as echo, Run(tmp_path, config=only(echo.port)) as run:
        run.ready()

        def traffic() -> None:
            while not done.wait(0.2):
                exchange(echo.port, 11)

        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            for number in range(50):
                run.config.write_text(only(echo.port, f"remote_port = [{echo.port}]" if number % 2 else ""))
                run.send(signal.SIGHUP)
                run.wait_for(rf"reloaded rules=1 version={number + 2}\b")
        finally:
            done.set()
            thread.join()
        balance = run.finish()
    for account in balance.values():
        assert account["passed"] == account["delivered"]
        assert account["lost"] == {}
