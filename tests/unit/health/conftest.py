"""An endpoint with certificates."""

from pathlib import Path

import pytest

from tests.support.endpoint import Place
from tests.support.servers.certificates import Authority, Certificate


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def server(authority: Authority) -> Certificate:
    return authority.issue("server")


@pytest.fixture
def place(tmp_path: Path, authority: Authority, server: Certificate) -> Place:
    return Place(tmp_path, authority, server)
