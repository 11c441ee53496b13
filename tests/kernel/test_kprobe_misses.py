"""What a kprobe misses while another one runs on its CPU, as the kernel counts it from Linux 6.7 on."""

import os

import pytest

from producer.demo.lab import Lab
from producer.events import TRANSMITS
from producer.kernel import bpf_syscall
from tests.support.capture import ALLOWED, Pair, Recording, kernel_version
from tests.support.programs import program_info

pytestmark = pytest.mark.root

_CALLED = "bpf_ktime_get_ns"
"""A function that the capture's programs call, so that a kprobe on it is missed then."""


@pytest.mark.skipif(ALLOWED != ("kprobe",), reason="kprobe is not the hook under test")
def test_runs_that_a_kprobe_missed_are_known(capture: Recording, lab: Lab, port: int) -> None:
    if kernel_version() < (6, 7):
        pytest.skip("kernels before 6.7 do not count what a kprobe misses")
    program = bpf_syscall.load_program("inner", bpf_syscall.RETURN_0, bpf_syscall.PROG_KPROBE)
    link = bpf_syscall.attach_kprobe(program, _CALLED, on_return=False, by_link=True)
    try:
        assert bpf_syscall.kprobe_misses(link) == (program_info(program).program_id, 0)
        with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
            pair.exchange(1, 1)
            pair.end()
        _, missed = bpf_syscall.kprobe_misses(link)
    finally:
        os.close(link)
        os.close(program)
    assert missed >= len(capture.of_port(TRANSMITS, port)) > 0
