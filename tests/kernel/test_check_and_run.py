"""`check` exits with 0 if and only if `run` starts: real starts, with hooks, of valid and invalid configurations."""

import random

import pytest

from producer.events import HOOKS
from tests.support.rebpf import rebpf

pytestmark = pytest.mark.root

RIGHT = [
    'metrics.listen = "127.0.0.1:0"',
    'capture.default = "drop"',
    "[[rules]]\nuid = [0]",
    'kafka.settings."max.in.flight" = 5',
]
WRONG = [
    'metrics.listen = "127.0.0.1:99999"',
    'capture.default = "foo"',
    "[[rules]]\nuid = [-1]",
    'kafka.settings."max.in.flight" = 6',
    'kafka.settings."enable.gapless.guarantee" = true',
    'kafka.settings."delivery.report.only.error" = true',
    'kafka.settings."security.protocol" = "ssl"\nkafka.settings."ssl.ca.location" = "/none"',
    'registry.url = "http://127.0.0.1:1"\nregistry.auth = "/none"',
    '[[rules]]\nuid = ["nobody-of-this-name"]',
]
_ROUNDS = 8


@pytest.mark.parametrize("number", range(_ROUNDS))
def test_check_says_0_if_and_only_if_run_starts(tmp_path, number):
    draw = random.Random(number)
    text = draw.choice(RIGHT if number % 2 else WRONG)
    path = tmp_path / "rebpf.toml"
    brokers = draw.choice(["", 'kafka.brokers = "127.0.0.1:1"\nkafka.stop_timeout_s = 0\n'])
    path.write_text(f'state_dir = "{tmp_path}/state"\n{brokers}{text}\n')
    checked = rebpf("check", "--local", "--config", path)
    ran = rebpf("run", "--config", path, "--duration", "0")

    assert (checked.returncode == 0) == (ran.returncode == 0), (text, checked.stdout, ran.stderr)
    if text in RIGHT or brokers:  # the embedded broker always uses plain text
        assert (ran.returncode == 0) == (text in RIGHT), (text, ran.stderr)
    assert "Traceback" not in checked.stderr + ran.stderr


@pytest.mark.parametrize("hook", HOOKS)
def test_check_says_of_each_hook_what_run_finds(tmp_path, hook):
    path = tmp_path / "rebpf.toml"
    settings = ['metrics.listen = "127.0.0.1:0"', f'capture.hooks = ["{hook}"]']
    path.write_text("\n".join([f'state_dir = "{tmp_path}/state"', *settings, ""]))
    checked = rebpf("check", "--local", "--config", path)
    ran = rebpf("run", "--config", path, "--duration", "0")

    assert (checked.returncode == 0) == (ran.returncode == 0), (checked.stdout, ran.stderr)
    available = all(f" {stream} by {hook}: available" in checked.stdout for stream in ("transmit", "retransmit"))
    assert available == (ran.returncode == 0), (checked.stdout, ran.stderr)
