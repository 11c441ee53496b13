"""Configurations from text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from producer.config.load import Config, load


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Config]:
    """Load a configuration file of this text."""

    def read(text: str) -> Config:
        path = tmp_path / "rebpf.toml"
        path.write_text(text)
        return load(path)

    return read
