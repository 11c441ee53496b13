"""The alert section and its rules: what is refused, and how it is said."""

import pytest

from producer.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "loss/web"', r"name: expected letters, .* 'loss/web'"),
        ('name = "silent"', r"name: .* the built-in rule's name"),
        ('by = "hots"', r"by: expected one of host, peer, subnet, .* found 'hots'"),
        ('measure = "mean"', r"measure: expected one of ratio, .* found 'mean'"),
        ("window_s = 0.5", r"window_s: expected 1 to .* seconds, found 0\.5"),
        ("threshold = 1.5", r"threshold: expected above 0 and at most 1, found 1\.5"),
        ("clear = 0.1", r"clear: expected above 0 and at most the threshold, found 0\.1"),
        ("for_s = -1", r"for_s: expected 0 to .* seconds, found -1"),
        ("quantile = 1.0", r"quantile: expected above 0 and below 1, found 1\.0"),
        ("prefix = 33", r"prefix: expected 0 to 32, found 33"),
        ('peer = ["10.0.0.1/8"]', r"peer: .* has host bits set"),
        ('peer = ["@10.0.0.0/8"]', r"peer: '@10.0.0.0/8' does not appear to be"),
        ("port = [70000]", r"port: expected a port or a range of ports, found 70000"),
        ('cause = ["rto"]\nmeasure = "srtt"', "cause: expected no causes, since round-trip times have none"),
        ('cause = ["retry"]', r"cause: expected other, rto, .* found 'retry'"),
        ('labels = { "a-b" = "c" }', r"labels: expected letters, digits and underscores, found 'a-b'"),
        ("minimum = -1", r"minimum: expected at least 0, found -1"),
    ],
)
def test_an_invalid_alert_rule_is_named_with_its_line(read, text, message):
    key = text.partition(" ")[0]
    own = "" if key == "name" else 'name = "own"\n'
    line = 5 if key == "name" else 6
    with pytest.raises(ConfigError, match=rf"line {line}: alert\.rules\[2\]\.{message}"):
        read(f'[[alert.rules]]\nname = "first"\n\n[[alert.rules]]\n{own}{text}\n')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('group = ""', "expected a name"),
        ("lateness_s = -1", "expected 0 to .* seconds"),
        ("repeat_s = 0", "expected 1 to .* seconds"),
        ("missed_heartbeats = -1", "expected a number from 0"),
        ('alertmanager = "alertmanager:9093"', "expected a URL"),
        ('rules = [{name = "a"}, {name = "a"}]', "another rule a$"),
    ],
)
def test_an_invalid_alert_section_is_refused(read, text, message):
    with pytest.raises(ConfigError, match=rf"line [12]: alert\.{text.partition(' ')[0]}.*: .*{message}"):
        read(f"[alert]\n{text}\n")
