"""The file of the endpoint's TLS, passwords and headers: what is taken, and that all else is refused by name."""

import logging
import os
import resource
import ssl
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import bcrypt
import pytest

from producer.commands.check_settings import settings
from producer.config.load import Config, load
from producer.errors import ConfigError
from producer.health.web_config import WebConfig, WebSettings
from tests.support.servers.certificates import Authority

HASH = "$2y$04$" + "a" * 53
SECRET = "hunter2hunter2"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    authority.issue("server")
    authority.issue("other")
    return authority


@pytest.fixture
def folder(tmp_path: Path, authority: Authority) -> Path:
    """A folder with the certificate and key of a server, a client authority, and things that are neither."""
    for name in ("server.pem", "server.key", "other.key", "authority.pem"):
        (tmp_path / name).write_bytes((authority.certificate.parent / name).read_bytes())
    (tmp_path / "junk.pem").write_text("junk\n")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    (folder / "web.yml").write_text(textwrap.dedent(text))
    return folder / "web.yml"


def read(folder: Path, text: str) -> WebConfig:
    return WebSettings(write(folder, text)).current()


TLS = "tls_server_config: {cert_file: server.pem, key_file: server.key%s}\n"


def test_a_whole_file(folder: Path) -> None:
    config = read(
        folder,
        f"""\
        tls_server_config:
          cert_file: {folder}/server.pem
          key_file: server.key          # relative to this file
          client_auth_type: RequireAndVerifyClientCert
          client_ca_file: authority.pem
          client_allowed_sans: ["prometheus", "FE80::1"]
          min_version: TLS12
          max_version: "TLS13"
          prefer_server_cipher_suites: no
          cipher_suites:
            - TLS_AES_128_GCM_SHA256
            - TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
        http_server_config:
          http2: false
          headers:
            X-Frame-Options: deny
            X-XSS-Protection: ""
        basic_auth_users:
          alice: {HASH}
          123: "{HASH}"
        """,
    )
    assert config.tls
    assert config.tls.verify_mode == ssl.CERT_REQUIRED
    assert config.tls.maximum_version == ssl.TLSVersion.TLSv1_3
    assert [each["name"] for each in config.tls.get_ciphers() if each["protocol"] == "TLSv1.2"] == [
        "ECDHE-ECDSA-AES128-GCM-SHA256"
    ]
    assert not config.tls.options & ssl.OP_CIPHER_SERVER_PREFERENCE
    assert config.users == {"alice": HASH, "123": HASH}
    assert config.headers == {"X-Frame-Options": "deny"}
    assert config.admits({"subjectAltName": (("DNS", "other"), ("IP Address", "FE80:0:0:0:0:0:0:1"))})
    assert not config.admits({"subjectAltName": (("DNS", "prometheus.example"),)})
    assert not config.admits({})


def test_certificates_may_stand_in_the_file_itself(folder: Path) -> None:
    texts = {key: (folder / name).read_text() for key, name in (("cert", "server.pem"), ("key", "server.key"))}
    lines = [f"  {key}: |\n" + textwrap.indent(text, "    ") for key, text in texts.items()]
    assert read(folder, "tls_server_config:\n" + "".join(lines)).tls


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "tls_server_config: {}\nbasic_auth_users:\n", "---\n"])
def test_an_empty_file_sets_nothing(folder: Path, text: str) -> None:
    assert read(folder, text) == WebConfig()


REFUSED = {
    "color: red": "color: unknown key",
    "tls_server_confg: {}": "tls_server_confg: unknown key: did you mean tls_server_config?",
    "TLS_server_config: {}": "TLS_server_config: unknown key",
    TLS % ", cert_fil: a": "tls_server_config.cert_fil: unknown key: did you mean cert_file?",
    "http_server_config: {http3: true}": "http_server_config.http3: unknown key",
    "http_server_config: {headers: {X-Other: a}}": "http_server_config.headers.X-Other: unknown key",
    "rate_limit: {interval: 1s, burst: 2}": "rate_limit: not supported",
    "http_server_config: {http2: true}": "http_server_config.http2: HTTP/2 is not supported",
    "http_server_config: {http2: 7}": "http_server_config.http2: expected true or false, found '7'",
    "http_server_config: {headers: {X-Frame-Options: maybe}}": "X-Frame-Options: expected deny or sameorigin",
    'http_server_config: {headers: {X-XSS-Protection: "a\\r\\nSet-Cookie: b"}}': "X-XSS-Protection: expected printable",
    TLS % ", curve_preferences: [CurveP256]": "tls_server_config.curve_preferences: not supported",
    TLS % ", min_version: TLS11": "tls_server_config.min_version: TLS11 is not supported",
    TLS % ", min_version: SSL3": "min_version: expected TLS12 or TLS13, found 'SSL3'",
    TLS % ", min_version: TLS13, max_version: TLS12": "max_version: expected at least min_version",
    TLS % ", cipher_suites: [TLS_RSA_WITH_RC4_128_SHA]": "cipher_suites: unknown suite 'TLS_RSA_WITH_RC4_128_SHA'",
    TLS % ", cipher_suites: [TLS_AES_128_GCM_SHA256]": "cipher_suites: expected at least one suite of TLS 1.2",
    TLS % ", cipher_suites: all": "cipher_suites: expected a list",
    TLS % ", cipher_suites: [[a]]": "cipher_suites: expected a list of strings",
    TLS % ", cert: a": "tls_server_config.cert: expected cert or cert_file, not both",
    TLS % ", client_auth_type: RequireAnyClientCert": "RequireAnyClientCert does not verify certificates",
    TLS % ", client_auth_type: Maybe": "client_auth_type: expected one of NoClientCert,",
    TLS
    % ", client_auth_type: RequireAndVerifyClientCert": "client_auth_type: RequireAndVerifyClientCert needs client_ca",
    TLS % ", client_ca_file: authority.pem": "client_auth_type: NoClientCert takes no client_ca",
    TLS % ", client_ca_file: junk.pem, client_auth_type: VerifyClientCertIfGiven": "client_ca_file: not in PEM format",
    TLS % ", client_allowed_sans: [a]": "client_allowed_sans: needs client_auth_type: RequireAndVerifyClientCert",
    "tls_server_config: {cert_file: server.pem}": "tls_server_config.key_file: missing",
    "tls_server_config: {key_file: server.key}": "tls_server_config.cert_file: missing",
    "tls_server_config: {min_version: TLS12}": "tls_server_config.cert_file: missing",
    "tls_server_config: {cert_file: none.pem, key_file: server.key}": "cert_file: .*none.pem: No such file",
    "tls_server_config: {cert_file: ., key_file: server.key}": "cert_file: .*: expected a regular file",
    "tls_server_config: {cert_file: server.pem, key_file: other.key}": "cert_file and .*key_file: key values mismatch",
    "tls_server_config: {cert_file: junk.pem, key_file: server.key}": "cert_file and .*key_file: ",
    "tls_server_config: [a]": "tls_server_config: expected a mapping",
    "tls_server_config: {cert_file: [a], key_file: b}": "tls_server_config.cert_file: expected text",
    f"basic_auth_users: {{alice: {SECRET}}}": "basic_auth_users.alice: expected a bcrypt hash",
    f"basic_auth_users: {{alice: {HASH.replace('04', '03')}}}": "basic_auth_users.alice: expected a cost from 4 to 14",
    f"basic_auth_users: {{alice: {HASH.replace('04', '31')}}}": "basic_auth_users.alice: .*, found 31",
    f"basic_auth_users: {{alice: [{HASH}]}}": "basic_auth_users.alice: expected a bcrypt hash",
    f'basic_auth_users: {{"a:b": {HASH}}}': "basic_auth_users.a:b: expected a user name",
    f'basic_auth_users: {{"": {HASH}}}': "basic_auth_users: entry 1: expected a user name",
    f"basic_auth_users:\n  alice: {HASH}\n  alice: {HASH}": "line 2: duplicate key",
    "basic_auth_users: {[a]: b}": "line 1: expected a key that is text",
    "{": "line 1: ",
    "a: b\n- c": "line 2: ",
    "- a": "expected a mapping",
    "text": "expected a mapping",
    "[" * 1500: "nested too deeply",
    "\x00": "expected YAML in UTF-8",
    "a: 1\n---\nb: 2": "line 2: but found another document",
    "# " + "a" * (1 << 17): "expected at most 131072 bytes",
    "a: &a [x]\nb: *c": "found undefined alias",
    "<<: {tls_server_config: {}}": "<<: unknown key",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:60])
def test_wrong_and_unsupported_settings_are_refused_by_name(folder: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[text]) as caught:
        read(folder, text)
    assert str(caught.value).startswith(f"metrics.web_config_file: {folder}/web.yml: ")
    assert str(caught.value).isprintable()
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_passphrase(folder: Path) -> None:
    command = ["openssl", "ec", "-in", "server.key", "-aes256", "-passout", "pass:secret", "-out", "encrypted.key"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="key_file: the key is encrypted: expected one without a passphrase"):
        read(folder, "tls_server_config: {cert_file: server.pem, key_file: encrypted.key}")


def be_missing(path: Path) -> None:
    path.unlink()


def be_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def be_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def be_latin(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\xe9")


@pytest.mark.parametrize("name", ["web.yml", "server.pem", "server.key", "authority.pem"])
@pytest.mark.parametrize("make", [be_missing, be_a_pipe, be_a_device, be_latin])
def test_files_that_are_not_regular_are_refused_without_blocking(
    folder: Path, name: str, make: Callable[[Path], None]
) -> None:
    path = write(folder, TLS % ", client_auth_type: VerifyClientCertIfGiven, client_ca_file: authority.pem")
    make(folder / name)
    with pytest.raises(ConfigError, match=r"^metrics\.web_config_file: "):
        WebSettings(path)


class Settings(WebSettings):
    """Settings whose files are looked at each time."""

    def __init__(self, path: Path) -> None:
        self.now = 0.0
        super().__init__(path, lambda: self.now)

    def current(self) -> WebConfig:
        self.now += 60
        return super().current()


def test_a_renewed_certificate_is_taken(folder: Path, authority: Authority) -> None:
    settings = Settings(write(folder, TLS % ""))
    before = settings.current().tls
    assert settings.current().tls is before
    renewed = authority.issue("server")
    (folder / "server.pem").write_bytes(renewed.certificate.read_bytes())
    settings.current()
    assert settings.current().tls is before, "it does not fit the old key"
    assert settings.last_error
    assert "key values mismatch" in settings.last_error
    (folder / "server.key").write_bytes(renewed.key.read_bytes())
    assert settings.current().tls is not before
    assert settings.last_error is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "TLS cannot be turned off without a restart"),
        (TLS % "", "passwords cannot be turned off without a restart"),
        ("color: red", "color: unknown key"),
    ],
)
def test_a_wrong_change_leaves_what_is_in_force_and_is_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, text: str, why: str
) -> None:
    settings = Settings(write(folder, TLS % "" + f"basic_auth_users: {{alice: {HASH}}}"))
    before = settings.current()
    write(folder, text)
    for _ in range(5):
        assert settings.current() is before
    assert settings.last_error
    assert why in settings.last_error
    assert [(record.levelno, why in record.getMessage()) for record in caplog.records] == [(logging.WARNING, True)]
    write(folder, TLS % "" + f"basic_auth_users: {{bob: {HASH}}}")
    assert settings.current().users == {"bob": HASH}
    assert settings.last_error is None


def test_without_descriptors_the_previous_settings_stay_and_none_stays_open(folder: Path) -> None:
    settings = Settings(write(folder, TLS % ""))
    lowest = os.dup(0)
    os.close(lowest)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, before[1]))
    try:
        assert settings.current().tls
        now_lowest = os.dup(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    os.close(now_lowest)
    assert now_lowest == lowest
    assert settings.last_error
    assert settings.last_error.endswith("cert_file and tls_server_config.key_file: Too many open files")
    assert settings.current().tls
    assert settings.last_error is None


def test_client_certificates_cannot_be_turned_off_by_a_change(folder: Path) -> None:
    verified = ", client_ca_file: authority.pem, client_auth_type: %s"
    settings = Settings(write(folder, TLS % (verified % "RequireAndVerifyClientCert")))
    for text in (TLS % "", TLS % (verified % "VerifyClientCertIfGiven")):
        write(folder, text)
        context = settings.current().tls
        assert context
        assert context.verify_mode == ssl.CERT_REQUIRED


def test_the_names_of_client_certificates_cannot_be_turned_off_by_a_file_that_is_being_written(folder: Path) -> None:
    verified = TLS % ", client_ca_file: authority.pem, client_auth_type: RequireAndVerifyClientCert%s"
    settings = Settings(write(folder, verified % ", client_allowed_sans: [prometheus]"))
    write(folder, verified % "")
    assert settings.current().sans == {"prometheus"}
    assert settings.last_error
    assert "client_allowed_sans cannot be turned off" in settings.last_error
    write(folder, verified % ", client_allowed_sans: [other]")
    assert settings.current().sans == {"other"}


def test_files_are_looked_at_once_a_second(folder: Path) -> None:
    times = iter([0.0, 0.5, 0.9, 1.1, 1.1, 1.1])
    settings = WebSettings(write(folder, ""), lambda: next(times))
    write(folder, "color: red")
    settings.current()
    settings.current()
    assert settings.last_error is None, "not looked at yet"
    settings.current()
    assert settings.last_error


def test_check_refuses_what_a_start_refuses(folder: Path) -> None:
    path = write(folder, "color: red")
    (folder / "rebpf.toml").write_text(f'[metrics]\nlisten = ""\nweb_config_file = "{path}"\n')
    config = load(folder / "rebpf.toml")
    (finding,) = [each for each in settings(config, folder / "rebpf.toml") if each.exit_code]
    assert finding.subject == "metrics.web_config_file"
    assert "line 3: metrics.web_config_file" in finding.text
    assert "color: unknown key" in finding.text
    path.write_text("")
    assert not [each for each in settings(config) if each.exit_code]
    assert Config().metrics.web_config_file is None


@pytest.mark.parametrize("prefix", ["2a", "2b", "2y"])
def test_hashes_of_each_tool_are_taken(folder: Path, prefix: str) -> None:
    hashed = bcrypt.hashpw(b"right", bcrypt.gensalt(4)).decode().replace("$2b$", f"${prefix}$")
    assert read(folder, f"basic_auth_users: {{alice: {hashed}}}").users == {"alice": hashed}


@pytest.mark.parametrize("bracket", ["[", "{"])
def test_many_open_brackets_are_an_error_of_the_first_too_many(folder: Path, bracket: str) -> None:
    """PyYAML's time for each token grows with the open brackets: 5,000 took a second of CPU."""
    with pytest.raises(ConfigError, match="line 2: nested too deeply"):
        read(folder, "\n" + bracket * 200)


@pytest.mark.parametrize("between", [" ", "", ":"])
def test_a_password_after_a_missing_colon_or_space_is_not_shown(folder: Path, between: str) -> None:
    with pytest.raises(ConfigError, match="basic_auth_users: entry 1: expected a") as caught:
        read(folder, f"basic_auth_users: {{alice{between}{SECRET}}}\n")
    assert SECRET not in str(caught.value)
