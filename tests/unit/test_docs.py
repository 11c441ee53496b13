"""The documents say what the schemas and the code say."""

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from producer.cli.main import rebpf
from producer.config.librdkafka import client_settings
from producer.config.load import Config, load
from producer.events import CAUSES, FLOWS, STREAMS
from producer.health.balance import stage
from producer.paths import SCHEMAS
from tests.support import configuration
from tests.support.documents import DOCS, FIELD, ROOT, type_of

RULES = ROOT / "deploy" / "prometheus" / "rebpf.rules.yml"
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))]
WITHOUT_COMMANDS = {
    "docs/architecture.md",
    "docs/decisions.md",
    "docs/events.md",
    "docs/performance.md",
    "docs/security.md",
    "docs/truth.md",
}


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
def test_events_md_has_every_field_of_the_schemas_as_it_is(stream: Any) -> None:
    section = "## Fields of connections" if stream == FLOWS else "## Fields of segments"
    rows = FIELD.findall((DOCS / "events.md").read_text().split(section)[1].split("\n## ")[0])
    documented = {name: (kind, text) for name, kind, text, only in rows if only in ("", stream.topic)}
    fields = json.loads((SCHEMAS / stream.schema_file).read_text())["fields"]
    assert documented == {field["name"]: (type_of(field), field["doc"]) for field in fields}


def test_events_md_explains_every_cause() -> None:
    section = (DOCS / "events.md").read_text().split("## Causes")[1].split("## Fields of segments")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [*sorted(CAUSES, key=section.index)]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(CAUSES)


def test_delivery_md_names_tests_that_there_are() -> None:
    section = (DOCS / "delivery.md").read_text().split("## Faults")[1].split("\n## ")[0]
    named = set(re.findall(r"`(test_\w+)` \|$", section, re.MULTILINE))
    there = {
        name for path in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 20
    assert named <= there


def test_delivery_md_has_each_reason_at_its_stage() -> None:
    section = (DOCS / "delivery.md").read_text().split("## The balance")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| (.*) \|$", section, re.MULTILINE)
    reasons = {reason: place for place, text in rows for reason in re.findall(r"`([a-z_]+)`", text)}
    assert len(reasons) == 10
    assert {reason: stage(reason) for reason in reasons} == reasons


def test_configuration_md_has_the_settings_that_there_are() -> None:
    above, mark, _ = configuration.DOCUMENT.read_text().partition(configuration.MARK)
    assert mark
    assert above == configuration.generated(), "run `python -m tests.support.configuration`"


def logged() -> set[str]:
    """Return the messages of warnings and errors in the code, with `...` for what is put in."""
    calls = (
        node
        for path in (ROOT / "producer").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger.")
    )
    return {
        re.sub(r"(%(\.\d)?[sdfr])+", "...", call.args[0].value)
        for call in calls
        if ast.unparse(call.func).endswith((".warning", ".error", ".exception"))
        and isinstance(call.args[0], ast.Constant)
    }


def commands(text: str) -> list[list[str]]:
    """Return the command lines of `rebpf` in a document, in blocks and in the text, without their comments."""
    lines = re.findall(r"^ {4}(?:\S*/)?rebpf (.*)$", text, re.MULTILINE) + re.findall(r"`rebpf ([a-z].*?)`", text)
    return [shlex.split(line, comments=True) for line in lines]


SETTING = re.compile(r"`(capture|kafka|spool|metrics|registry|alert)\.([a-z_]+)[` =]")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_settings_that_the_documents_name_exist(name: str) -> None:
    config = Config()
    named = SETTING.findall((ROOT / name).read_text())
    assert not [f"{section}.{key}" for section, key in named if not hasattr(getattr(config, section), key)]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_and_options_in_the_documents_are_there(name: str) -> None:
    found = [words for words in commands((ROOT / name).read_text()) if words]
    assert found or name in WITHOUT_COMMANDS
    for words in found:
        group: click.Command = rebpf
        while isinstance(group, click.Group) and words and words[0] in group.commands:
            group = group.commands[words.pop(0)]
        assert group is not rebpf, words
        options = {option for parameter in group.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, (group.name, words)


@pytest.mark.parametrize("name", ["README.md", "docs/operations.md"])
def test_configurations_in_the_documents_can_be_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "kafka").write_text("secret\n")
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "rebpf.toml").write_text(block)
        config = load(tmp_path / "rebpf.toml")
        client_settings(config.kafka.brokers, config.kafka.settings)


PASSED_ON = {"...", "alert: ...", "state: ..."}
"""Messages that have no text of their own."""


def test_operations_md_has_each_message_of_the_log() -> None:
    section = (DOCS / "operations.md").read_text().split("## Log lines")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
    assert set(named) | PASSED_ON == logged()


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))], ids=str)
def test_prose_ends_at_100_columns(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "    ", "<!--"))]
    assert [line for line in prose if len(line) > 100 and " " in line.strip()] == []


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [*map(ROOT.joinpath, DOCUMENTS), ROOT / "deploy/flink/README.md"], ids=str)
def test_links_lead_to_files_and_headings_that_exist(path: Path) -> None:
    links = re.findall(r"\]\((?!\w+://)([^)#\s]*)(?:#([^)\s]*))?\)", path.read_text())
    broken = [name for name, _ in links if not (path.parent / name).exists()]
    targets = [(path.parent / name if name else path, anchor) for name, anchor in links if anchor]
    unknown = [(target.name, anchor) for target, anchor in targets if anchor not in anchors(target)]
    assert (broken, unknown) == ([], [])


def test_operations_md_has_a_paragraph_for_each_alert() -> None:
    alerts = re.findall(r"^ *- alert: (\w+)$", RULES.read_text(), re.MULTILINE)
    section = (DOCS / "operations.md").read_text().split("## Alerts\n")[1].split("\n## ")[0]
    titles, texts = (
        re.findall(r"^### (\w+)$", section, re.MULTILINE),
        re.split(r"^### \w+$", section, flags=re.MULTILINE),
    )
    assert titles == alerts
    for title, text in zip(titles, texts[1:], strict=True):
        assert re.search(r"\bCheck:\s\S.*\bFix(, by stage)?:\s+\S", text, re.DOTALL), title


def test_each_alerts_runbook_is_its_paragraph() -> None:
    named = re.findall(r"- alert: (\w+)$.*?runbook_url: (\S+)$", RULES.read_text(), re.MULTILINE | re.DOTALL)
    assert named
    page = "https://docs.rebpf.example/operations.md"
    assert [runbook for _, runbook in named] == [f"{page}#{alert.lower()}" for alert, _ in named]


def test_operations_md_grants_what_the_tests_producer_has() -> None:
    """tests/support/servers/secure.py's user produces with these rights alone."""
    text = (DOCS / "operations.md").read_text()
    operations = re.findall(r"--operation (\w+)", text.split("## Rights")[1].split("Brokers before")[0])
    granted = (ROOT / "tests/support/servers/secure.py").read_text().split("_WHAT_A_PRODUCER_NEEDS = ")[1]
    assert re.findall(r"AclOperation\.(\w+)", granted.splitlines()[0]) == operations
