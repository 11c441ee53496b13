"""bpf/number.h without atomic fetch: interrupted at each instruction, runs on one CPU take each number once."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from producer.paths import BPF

# The trap flag stops the processor after each instruction. At two of them the handler runs `next_seq` again, as a
# softirq does. For each two, it prints a line: the numbers of 2 runs and of those that interrupted them.
HARNESS = r"""
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <string.h>
#undef __always_inline
typedef unsigned long long u64;
#define __always_inline inline
struct counters { u64 begin, seq; };
struct levels;
static struct levels *lookup(int *stream);
#define BPF_PERCPU_ARRAY(name, type, size) \
	static type storage[size]; \
	static struct { type *(*lookup)(int *); } name = { lookup }
#define HAS_ATOMIC_FETCH 0
#include "number.h"
static struct levels *lookup(int *stream) { return &storage[*stream]; }

static struct counters counter;
static int step, first, second;

__attribute__((noinline)) static void take(void) { printf("%llu ", next_seq(&counter, 1)); }

static void interrupt(int signal)
{
	step++;
	if (step == first || step == second)
		take();
}

static int run(void)
{
	static u64 taken[2];

	memset(storage, 0, sizeof(storage));
	counter.begin = counter.seq = 1000;
	step = 0;
	for (int i = 0; i < 2; i++) {
		asm volatile("pushfq; orq $0x100, (%%rsp); popfq" ::: "memory", "cc");
		taken[i] = next_seq(&counter, 1);
		asm volatile("pushfq; andq $~0x100, (%%rsp); popfq" ::: "memory", "cc");
	}
	for (int i = 0; i < 2; i++)
		printf("%llu ", taken[i]);
	printf("%llu\n", counter.seq);
	return step;
}

int main(void)
{
	signal(SIGTRAP, interrupt);
	int steps = run();
	for (first = 1; first <= steps; first++)
		for (second = first + 1; second <= steps && second < first + 9; second++)
			run();
}
"""


@pytest.fixture(scope="module", params=["-O1", "-O2"])
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if platform.machine() != "x86_64":
        pytest.skip("only x86-64 has this trap flag")
    if not shutil.which("gcc"):
        pytest.skip("no gcc (scripts/setup installs it)")
    folder = tmp_path_factory.mktemp("number")
    (folder / "harness.c").write_text(HARNESS)
    command = ["gcc", request.param, "-mno-red-zone", f"-I{BPF}", "harness.c", "-o", "harness"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "harness"


def test_no_number_is_taken_twice_or_left_out(harness: Path) -> None:
    done = subprocess.run([harness], capture_output=True, text=True, check=True)
    undisturbed, *interrupted = ([*map(int, line.split())] for line in done.stdout.splitlines())
    assert undisturbed == [1001, 1002, 1002]
    assert len(interrupted) > 200
    assert [line for line in interrupted if sorted(line[:-1]) != [*range(1001, 1005)] or line[-1] != 1004] == []
