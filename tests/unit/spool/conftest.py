"""An empty spool."""

from pathlib import Path

import pytest

from tests.support.spool import Setup


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path / "spool" / "transmit")
