#include "tcp_counts.h"
#include "hash.h"

#include <netinet/tcp.h>
#include <string.h>

#define RECORD_SIZE (RECORD_WORDS + TCP_COUNTERS)
#define RESULT_SIZE (RESULT_WORDS + TCP_COUNTERS)

/* A socket can connect again, so the time of the start is part of the key; without a cookie, so are its ends. */
static int64_t key_of(const struct flow_event *event, uint64_t seed)
{
	uint64_t hash = hash_word(~seed, event->flow.sk_cookie, seed), words[4]; /* saddr, daddr */

	if (!event->flow.sk_cookie) {
		memcpy(words, event->flow.saddr, sizeof(words));
		for (size_t i = 0; i < 4; i++)
			hash = hash_word(hash, words[i], seed);
		hash = hash_word(hash, (uint64_t)event->flow.sport << 16 | event->flow.dport, seed);
	}
	return (int64_t)hash_word(hash_word(hash, event->start_ns, seed), event->flow.netns, seed);
}

static void fill_record(const struct flow_event *event, uint64_t seed, int64_t *record)
{
	int64_t *counters = record + RECORD_WORDS, *by_cause = counters + 1;
	int64_t syn_acks = event->retrans_syn_ack;

	record[RECORD_KEY] = key_of(event, seed);
	record[RECORD_TS_NS] = (int64_t)event->ts;
	record[RECORD_START_NS] = (int64_t)event->start_ns;
	record[RECORD_FLAGS] = CONNECTION_COUNTS | (event->reason == REASON_CLOSE ? CONNECTION_CLOSES : 0);
	/* The kernel counts an accepted connection's SYN-ACK before the connection has a socket: it is added here. */
	counters[0] = event->segs_out + syn_acks + (event->role == ROLE_SERVER);
	by_cause[CAUSE_OTHER] = event->retrans_other;
	by_cause[CAUSE_RTO] = event->retrans_rto;
	by_cause[CAUSE_FAST] = event->retrans_fast;
	by_cause[CAUSE_SLOW_START] = event->retrans_slow_start;
	by_cause[CAUSE_TLP] = event->retrans_tlp;
	by_cause[CAUSE_SYN] = event->retrans_syn;
	by_cause[CAUSE_SYN_ACK] = syn_acks;
}

static void count_closed(const struct flow_event *event, const struct tcp_groups *groups, struct tcp_counts *counts)
{
	bool connecting = event->state == TCP_SYN_SENT;
	u32 number = event->error < TCP_ERROR_NUMBERS ? event->error : TCP_ERROR_NUMBERS - 1;

	counts->closed++;
	if (event->known & KNOWN_ERROR)
		counts->failed[connecting ? PHASE_CONNECT : PHASE_ESTABLISHED][groups->errors[number]]++;
	else if (connecting)
		counts->given_up++;
}

static void observe_srtt(const struct flow_event *event, const struct tcp_groups *groups, struct tcp_counts *counts)
{
	size_t bucket = 0;

	if (!(event->known & KNOWN_TCP) || !event->srtt_us)
		return;
	for (size_t i = 0; i < TCP_SRTT_BOUNDS; i++)
		bucket += groups->srtt_bounds_us[i] < event->srtt_us;
	counts->srtt[bucket]++;
	counts->srtt_sum_us += event->srtt_us;
}

void tcp_count_flows(struct connections *table, struct rows rows, const struct tcp_groups *groups,
		     struct tcp_counts *counts)
{
	for (size_t i = 0; i < rows.count; i++) {
		int64_t record[RECORD_SIZE], result[RESULT_SIZE];
		struct flow_event event;

		memcpy(&event, rows.data + (ptrdiff_t)i * rows.stride, sizeof(event));
		fill_record(&event, table->seed, record);
		connections_add(table, record, 1, result);
		counts->segments += result[RESULT_WORDS];
		for (size_t j = 0; j < CAUSES; j++)
			counts->retransmitted[j] += result[RESULT_WORDS + 1 + j];
		if (result[RESULT_FLAGS] & CONNECTION_OPENED)
			counts->opened[event.role <= ROLE_SERVER ? event.role : ROLE_UNKNOWN]++;
		if (result[RESULT_FLAGS] & CONNECTION_CLOSED)
			count_closed(&event, groups, counts);
		if (result[RESULT_WORDS])
			observe_srtt(&event, groups, counts);
	}
}
