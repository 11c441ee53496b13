"""Certificates for TLS on 127.0.0.1: an authority and its certificates, made with openssl."""

import subprocess
from pathlib import Path
from typing import NamedTuple

# Before OpenSSL 3.4, only `openssl ca` accepts dates in the past. It needs a settings file and a records file.
_SETTINGS = """\
[ca]
default_ca = own
[own]
database = records
new_certs_dir = .
rand_serial = yes
unique_subject = no
default_md = sha256
policy = any
x509_extensions = local
[any]
commonName = supplied
[local]
subjectAltName = DNS:localhost, IP:127.0.0.1
"""
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_VALID = ("-days", "7")
_EXPIRED = ("-startdate", "20200101000000Z", "-enddate", "20200102000000Z")


class Certificate(NamedTuple):
    """PEM files: a private key, its certificate, and both in one file, as Kafka's keystore requires."""

    key: Path
    certificate: Path
    both: Path


class Authority:
    """A certificate authority with its files in `folder`; trust it with `certificate`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = folder / "authority.key"
        self.certificate = folder / "authority.pem"
        (folder / "settings").write_text(_SETTINGS)
        (folder / "records").touch()
        output = ("-keyout", self._key, "-out", self.certificate)
        self._openssl("req", "-x509", *_KEY, *_VALID, "-subj", f"/CN={folder.name}", *output)

    def issue(self, name: str, *, expired: bool = False) -> Certificate:
        """Issue a certificate with the subject CN=name, valid or expired."""
        files = f"{name}-expired" if expired else name
        key, request, certificate, both = (self._folder / f"{files}.{end}" for end in ("key", "csr", "pem", "both"))
        self._openssl("req", "-new", *_KEY, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        signer = ("-config", "settings", "-cert", self.certificate, "-keyfile", self._key)
        dates = _EXPIRED if expired else _VALID
        self._openssl("ca", "-batch", "-notext", *signer, *dates, "-in", request, "-out", certificate)
        both.write_text(key.read_text() + certificate.read_text())
        return Certificate(key, certificate, both)

    def _openssl(self, *arguments: str | Path) -> None:
        done = subprocess.run(["openssl", *arguments], cwd=self._folder, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"openssl {arguments[0]}: {done.stderr}")
