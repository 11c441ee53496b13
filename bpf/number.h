/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Numbers the events of a CPU. A number is used even if the ring is full, so that a reader of the topic sees the gap.
 *
 * A softirq may interrupt a program on its CPU and run a program that takes a number too. It ends before the interrupted
 * one continues. So on a kernel without an atomic addition that returns the sum, two plain counts suffice: of the numbers
 * that outer runs took, and of those that inner runs took. A number is the sum of both at the moment when its run raised
 * its own count. An inner run raises only the inner count, so its sum is right at any time. An outer run may be
 * interrupted after it has raised its count; then the first inner run has stored the inner count of that moment.
 */
#ifndef REBPF_NUMBER_H
#define REBPF_NUMBER_H

#if HAS_ATOMIC_FETCH
static __always_inline u64 next_seq(struct counters *counter, int stream)
{
	return __sync_fetch_and_add(&counter->seq, 1) + 1;
}
#else
struct levels {
	u64 level; /* runs that are taking a number now */
	u64 outer;
	u64 inner;
	u64 outer_seen; /* by the last inner run */
	u64 inner_before; /* `inner` before the first inner run that saw `outer_seen` */
};
/* By stream. The programs write. */
BPF_PERCPU_ARRAY(levels_of, struct levels, 3);

#define VOLATILE(member) (*(volatile u64 *)&(member))

static __always_inline u64 number_of_outer(struct levels *levels)
{
	u64 outer = VOLATILE(levels->outer) + 1, inner;

	VOLATILE(levels->outer) = outer;
	inner = VOLATILE(levels->inner);
	if (VOLATILE(levels->outer_seen) == outer)
		inner = VOLATILE(levels->inner_before);
	return outer + inner;
}

static __always_inline u64 number_of_inner(struct levels *levels)
{
	if (levels->outer_seen != levels->outer) {
		levels->outer_seen = levels->outer;
		levels->inner_before = levels->inner;
	}
	levels->inner++;
	return levels->outer + levels->inner;
}

/* The agent reads counter->seq, which needs no sum to be returned. */
static __always_inline u64 next_seq(struct counters *counter, int stream)
{
	struct levels *levels = levels_of.lookup(&stream);
	u64 number;

	if (!levels)
		return 0;
	__sync_fetch_and_add(&counter->seq, 1);
	VOLATILE(levels->level) = levels->level + 1;
	number = levels->level == 1 ? number_of_outer(levels) : number_of_inner(levels);
	VOLATILE(levels->level) = levels->level - 1;
	return counter->begin + number;
}
#endif

#endif
