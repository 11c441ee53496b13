"""`rebpf run` with TLS and passwords on its endpoint, and `rebpf status` and `check` with it."""

import http.client
import json
import ssl

import pytest

from tests.support.rebpf import Run, rebpf, wait_until
from tests.support.servers.certificates import Authority

pytestmark = pytest.mark.root

CONFIG = '[metrics]\nlisten = "127.0.0.1:0"\nweb_config_file = "{}"\n'
TLS = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n"
CLIENTS = "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: authority.pem\n"


def test_a_producer_serves_by_tls_and_its_status_is_known_to_root_alone(tmp_path):
    authority = Authority(tmp_path / "authority")
    authority.issue("server")
    file = authority.certificate.parent / "web.yml"
    file.write_text(TLS + CLIENTS)
    with Run(tmp_path, config=CONFIG.format(file)) as run:
        run.ready()
        status = ["status", "--state-dir", run.state_dir, "--json"]
        # There is none before the loop's first step.
        first = wait_until("a status", lambda: json.loads(rebpf(*status).stdout or "null"))
        assert first["pid"] == run.pid

        def reasons() -> list[str]:
            return list(json.loads(rebpf(*status).stdout)["reasons"])

        wait_until("all is well", lambda: not reasons())

        facts = json.loads((run.state_dir / "agent.json").read_text())
        assert facts["status_url"].startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(authority.certificate))
        client = authority.issue("prometheus")
        context.load_cert_chain(client.certificate, client.key)
        connection = http.client.HTTPSConnection(facts["status_url"].removeprefix("https://"), context=context)
        connection.request("GET", "/metrics")
        assert b"rebpf_events_passed_total" in connection.getresponse().read()
        connection.close()

        file.write_text("color: red")
        expected = f"metrics.web_config_file: {file}: color: unknown key"
        wait_until("the reason is shown", lambda: expected in reasons())
        file.write_text(TLS + CLIENTS)
        wait_until("well again", lambda: not reasons())
        run.finish()
    assert not (run.state_dir / "status.sock").exists()
    assert run.log.count("the previous settings stay in force") == 1


def test_check_and_a_start_refuse_the_same(tmp_path):
    file = tmp_path / "web.yml"
    file.write_text("rate_limit: {burst: 1}")
    said = f"line 3: metrics.web_config_file: {file}: rate_limit: not supported"
    with Run(tmp_path, config=CONFIG.format(file)) as run:
        assert run.wait() == 78
        assert said.partition("line 3: ")[2] in run.log
    checked = rebpf("check", "--local", "--config", run.config)
    assert checked.returncode == 78
    assert said in checked.stdout
