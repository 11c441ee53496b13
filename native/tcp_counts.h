/* What the metrics of TCP count from records of connections: producer/health/tcp.py. No Python. */
#ifndef REBPF_TCP_COUNTS_H
#define REBPF_TCP_COUNTS_H

#include <stdint.h>

#include "connections.h"
#include "rows.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int32_t s32;
typedef uint64_t u64;

#include "events.h"

enum tcp_phase {
	PHASE_CONNECT,
	PHASE_ESTABLISHED,
	PHASES,
};

#define TCP_ERRORS 10
#define TCP_ERROR_NUMBERS 256
#define TCP_SRTT_BOUNDS 16
#define TCP_COUNTERS (1 + CAUSES) /* of a connection's entry: segments sent, retransmissions by cause */

/* The sums; the caller sets them to 0 at first. The dtype _COUNTS in producer/health/tcp.py is the same. */
struct tcp_counts {
	int64_t segments;
	int64_t retransmitted[CAUSES];
	int64_t opened[ROLE_SERVER + 1];
	int64_t closed;
	int64_t failed[PHASES][TCP_ERRORS];
	int64_t given_up;
	int64_t srtt[TCP_SRTT_BOUNDS + 1]; /* the last one is of all above the bounds */
	int64_t srtt_sum_us;
};

struct tcp_groups {
	const uint8_t *errors; /* index in `failed` by errno, TCP_ERROR_NUMBERS of them; the last is of all others */
	const int64_t *srtt_bounds_us; /* TCP_SRTT_BOUNDS of them, rising; a bound belongs to what is below it */
};

/* Add what rows of struct flow_event count beyond the connections' earlier ones; `table` has TCP_COUNTERS counters. */
void tcp_count_flows(struct connections *table, struct rows rows, const struct tcp_groups *groups,
		     struct tcp_counts *counts);

#endif
