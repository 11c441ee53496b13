"""The report in a real browser, as wide as a phone, a sheet of paper and a desk: it fits, and nothing is missing."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from producer.commands.report import report
from producer.consume.period import Period
from producer.export.sources import Files
from tests.support.analysis import write_scene

pytestmark = pytest.mark.extended

BROWSER = shutil.which("chromium-headless-shell")
PLOTS = 6
"""Causes, peers, round-trip times and three connections."""
MEASURE = """<script>
const plots = [...document.querySelectorAll("svg")].map(each => Math.round(each.getBoundingClientRect().width));
const [page, shown] = [document.documentElement.scrollWidth, document.documentElement.clientWidth];
const lines = (node, at, word) => {
  const range = document.createRange();
  range.setStart(node, at);
  range.setEnd(node, at + word.length);
  return new Set([...range.getClientRects()].map(each => each.top)).size;
};
const broken = [...document.querySelectorAll("th")].flatMap(each => [...each.innerText.matchAll(/\\S+/g)]
  .filter(word => lines(each.firstChild, word.index, word[0]) > 1).map(word => word[0]));
const cut = [...document.querySelectorAll("pre")].filter(each => each.scrollWidth > each.clientWidth).length;
document.title = JSON.stringify({page, shown, plots, broken, cut, text: document.body.innerText});
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_scene(tmp_path_factory.mktemp("scene"))
    report(Files([folder]), Period(), folder / "report.html", None)
    return folder / "report.html"


def browse(page: Path, width: int, *options: str) -> "subprocess.CompletedProcess[str]":
    if BROWSER is None:
        pytest.skip("no chromium-headless-shell: scripts/setup --all installs it")
    argv = [BROWSER, "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    argv += [f"--window-size={width},2000", f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("width", [390, 718, 1280])
def test_the_page_fits_and_shows_all_plots(page: Path, width: int) -> None:
    measured = page.with_name(f"measured-{width}.html")
    # The report's policy forbids scripts, also the one that measures.
    text = re.sub(r"<meta http-equiv.*>", "", page.read_text()).replace("</body>", MEASURE)
    measured.write_text(text)
    dom = browse(measured, width, "--dump-dom").stdout
    found = json.loads(html.unescape(dom.partition("<title>")[2].partition("</title>")[0]))
    assert found["page"] <= found["shown"] == width
    assert len(found["plots"]) == PLOTS
    assert min(found["plots"]) >= 300
    assert (found["broken"], found["cut"]) == ([], 0), "words of titles are whole, and commands can be read"
    assert "Worst peer: 10.0.0.7, 150 segments (5.00%)" in found["text"]
    assert "<script>alert(1)</script>" in found["text"]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_as_it_is_draws_in_color_and_blocks_nothing(page: Path, width: int) -> None:
    picture = page.with_name(f"{width}.png")
    done = browse(page, width, f"--screenshot={picture}")
    assert not re.search(r"CONSOLE|Refused|Content Security Policy", done.stderr)
    pixels = image.imread(picture)[:, :, :3]
    assert pixels.shape[1] == width
    vivid = (pixels.max(axis=2) - pixels.min(axis=2)) > 0.4
    assert np.count_nonzero(vivid) > 2000
