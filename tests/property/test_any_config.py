"""Any configuration gives settings that a producer can start with, or one line that says what is wrong.

`check` and `run` agree: what `check --local` finds in settings and rules is what the client and the rules of `run` say.
"""

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from producer.commands import check_settings
from producer.config.load import Config, load
from producer.errors import ConfigError, RebpfError
from producer.kafka.sink import KafkaSink, producer_settings
from producer.rules.resolve import resolve

NUMBERS = st.sampled_from(
    ["0", "1", "-1", "65536", "4294967295", "8589934592", "0x" + "f" * 4000, "0.5", "1e300", "nan", "inf", "-inf"]
)
OTHERS = st.sampled_from(["true", "2020-01-01", "12:00:00", "[]", "{}", "[[1]]", "[[[]]]", "[{a = 1}]"])
WORDS = st.sampled_from(
    [
        "",
        "  ",
        "keep",
        "drop",
        "drop_oldest",
        "a:1",
        "127.0.0.1:0",
        "http://a:1",
        "http://[",
        "/tmp/x",
        "x",
        "@",
        "@/dev/null",
        "10.0.0.0/8",
        "fe80::1%eth0",
        "::/0",
        "1-2",
        "9-1",
        "root",
        "lo",
        "..",
        "**",
        "event",
        "ESTABLISHED",
        "fentry",
        "count",
        "peer",
        "ssl",
        "6",
    ]
)


def quoted(text: str) -> str:
    plain = (c if (c.isalnum() and c.isascii()) or c in " .:/@-[]%" else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(plain)}"'


TEXTS = (WORDS | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)).map(quoted)
VALUES = NUMBERS | OTHERS | TEXTS | st.lists(NUMBERS | TEXTS, max_size=3).map(lambda each: f"[{', '.join(each)}]")
SECTIONS = {
    "": "host state_dir",
    "capture": "hooks addresses ports default transmit_ring_bytes retransmit_ring_bytes pin latency_s "
    "retransmit_at_once transmit_events_per_s btf",
    "kafka": "brokers topic_prefix settings stop_timeout_s",
    "kafka.settings": "acks linger.ms max.in.flight delivery.report.only.error client.id enable.gapless.guarantee "
    "group.id security.protocol ssl.ca.location message.max.bytes batch.size retries debug lingr.ms fetch.max.bytes",
    "spool": "transmit_bytes retransmit_bytes max_age_s quarantine_bytes when_full spill_after_s",
    "metrics": "listen",
    "registry": "url register timeout_s auth ca certificate key",
    "alert": "group lateness_s listen wait_s lookback_s missed_heartbeats stdout alertmanager webhook repeat_s rules",
    "[alert.rules]": "name by prefix prefix_v6 measure quantile window_s for_s threshold clear minimum host peer port "
    "unit cause only_labels severity labels annotations",
    "[rules]": "name action transmit retransmit sample sample_by sample_retransmits address local_address "
    "remote_address port local_port remote_port netns cgroup unit uid interface state",
}
ENTRIES = st.sampled_from([(section, key) for section, keys in SECTIONS.items() for key in keys.split()])


@st.composite
def texts(draw: st.DrawFn) -> str:
    lines = []
    for (section, key), value in draw(st.dictionaries(ENTRIES, VALUES, min_size=1, max_size=3)).items():
        lines += [f"[{section}]"] if section else []
        lines.append(f'"{key}" = {value}')
    return "\n".join(lines)


OVER = st.fixed_dictionaries(
    {},
    optional={
        "kafka__brokers": WORDS | st.text(max_size=8),
        "registry__url": WORDS | st.text(max_size=8),
        "capture__ports": st.tuples(st.integers(-1, 1 << 17)),
        "state_dir": (WORDS | st.text(max_size=8)).map(Path),
        "capture__pin": (WORDS | st.text(max_size=8)).map(Path),
    },
)


def read(text: str, over: dict[str, Any]) -> Config | None:
    """Return the configuration, or None if it is rejected, in one printable line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rebpf.toml"
        path.write_text(text)
        try:
            return load(path).with_values(**over)
        except ConfigError as error:
            said = str(error)
    assert said.isprintable()
    assert len(said) < 2000
    return None


def starts(config: Config) -> bool:
    """Build what `run` builds from the settings before it touches the kernel, except what needs a server."""
    try:
        sink = KafkaSink(producer_settings(config.kafka.brokers and "127.0.0.1:1", config.kafka.settings), {})
        resolve(config, None).tables()
        sink.open()
    except RebpfError:
        return False
    sink.close()
    return True


@given(texts(), OVER)
@settings(max_examples=3 * settings.default.max_examples)
def test_any_configuration_is_taken_or_refused_in_one_line_and_check_agrees_with_run(
    text: str, over: dict[str, Any]
) -> None:
    config = read(text, over)
    if config is None:
        return
    found = {finding.subject: finding.exit_code for finding in check_settings.settings(config)}
    assert starts(config) == (not found.get("kafka.settings") and not found["rules"])
