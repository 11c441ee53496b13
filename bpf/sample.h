/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Samples events: by the rate of a rule (rules.h), and transmits by the budget, too.
 */
#ifndef REBPF_SAMPLE_H
#define REBPF_SAMPLE_H

/*
 * The budget for transmits: turn << 32 | rate. In each turn another one in `rate` connections is captured. The agent writes
 * it (producer/pipeline/budget.py). The rate is a power of two, so those captured at a rate are also captured at each lower
 * one; 0: no budget.
 */
BPF_ARRAY(transmit_budget, u64, 1);

/* The rate of the budget; 0: this is not the connection's turn. */
static __always_inline u32 budget_rate(const struct choice *choice)
{
	u32 zero = 0, rate;
	u64 *word = transmit_budget.lookup(&zero), budget = word ? *(volatile u64 *)word : 0;

	rate = budget ? budget : 1;
	return (choice->flow_hash + (u32)(budget >> 32)) & (rate - 1) ? 0 : rate;
}

/* Whether an event of the stream is possible. Not stored with the socket: the budget changes. */
static __always_inline bool may_take(const struct choice *choice, u32 stream)
{
	return choice->rates[stream] && (stream != STREAM_TRANSMIT || budget_rate(choice));
}

/* The number of events that this one represents; 0: drop it. */
static __always_inline u32 sample_rate(const struct choice *choice, u32 stream)
{
	u64 rate = choice->rates[stream];

	if (rate && choice->by_event[stream] && bpf_get_prandom_u32() % (u32)rate)
		return 0;
	if (stream == STREAM_TRANSMIT)
		rate *= budget_rate(choice);
	return rate < ~0U ? rate : ~0U;
}

#endif
