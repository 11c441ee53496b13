"""The commands that made the pictures of docs/ still run, and show the peer that loses segments."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pictures import BROWSER, DOCS, PICTURES, Studio, studio
from tests.support.twenty_peers import GUILTY

pytestmark = pytest.mark.root

SHOWN = {"demo": r"RetransSegs", "report": r"\A\x89PNG"}
TITLE = re.compile(r"<title>.*?</title>")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Studio, Path]]:
    folder = tmp_path_factory.mktemp("pictures")
    with studio(folder, wait_s=1.0) as studio_:
        yield studio_, folder


# test_demo.py runs the demo, whose picture takes longest.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.extended) if name == "demo" else name for name in PICTURES]
)
def test_a_picture_is_drawn_by_the_command_in_it(made: tuple[Studio, Path], name: str) -> None:
    if name == "report" and BROWSER is None:
        pytest.skip("no chromium-headless-shell: scripts/setup --all installs it")
    studio_, folder = made
    PICTURES[name](studio_)
    (path,) = folder.glob(f"{name}.*")
    text = path.read_text("latin-1")
    assert re.search(SHOWN.get(name, re.escape(GUILTY)), text)
    assert TITLE.findall(text) == TITLE.findall((DOCS / path.name).read_text("latin-1"))


def test_the_pictures_are_in_the_documents() -> None:
    texts = [path.read_text() for path in (DOCS.parent / "README.md", DOCS / "views.md", DOCS / "analysis.md")]
    shown = {match for text in texts for match in re.findall(r"!\[[^]]+\]\((?:docs/)?([\w-]+)\.(?:svg|png)\)", text)}
    assert shown == set(PICTURES)
