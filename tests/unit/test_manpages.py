"""The manual pages, which packages make from the documents and the help."""

import re
import runpy

import pytest

from tests.support.documents import ROOT

MANPAGES = runpy.run_path(str(ROOT / "deploy/packaging/manpages.py"))


@pytest.mark.parametrize("name", ["command_page", "configuration_page"])
def test_a_manual_page_has_no_markdown_left(name: str) -> None:
    page = MANPAGES[name]("1.0", "2026-01-01")
    text = re.sub(r"^\.nf\n.*?^\.fi\n", "", page, flags=re.MULTILINE | re.DOTALL)
    assert ".SH" in text
    assert re.findall(r"^(?:#|\\-|\|) .*|.*(?:`|\]\(|; \\- ).*", text, re.MULTILINE) == []


def test_a_list_is_set_as_one() -> None:
    assert [*MANPAGES["_markdown"]("- one\n  item\n- `two`")] == [".IP \\(bu 2\none item", ".IP \\(bu 2\n\\fBtwo\\fR"]


def test_every_exit_code_is_in_the_manual() -> None:
    status = MANPAGES["command_page"]("1.0", "2026-01-01").partition("EXIT STATUS")[2]
    codes = list(map(int, re.findall(r"^\\fB(\d+)\\fR$", status, re.MULTILINE)))
    documented = re.findall(r"\| (\d+) \|$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert {*map(int, documented)} <= {*codes}
    assert codes == sorted(codes)
