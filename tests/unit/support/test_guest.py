"""What runs in a host under systemd, which has Python and the package, but nothing that the tests install."""

import subprocess
import sys

from tests.support.documents import ROOT

_ABSENT = ("pytest", "hypothesis", "numpy", "fastavro", "confluent_kafka")


def test_the_steps_of_a_guest_need_no_package_of_the_tests() -> None:
    program = f"import sys\nsys.modules.update(dict.fromkeys({_ABSENT}))\nimport tests.vm.systemd_steps"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
