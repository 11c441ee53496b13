/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The third stream: a record for each connection when it closes, and one at each run of the iterator.
 *
 * The kernel's counters of a socket need no program for each segment. Only what it does not store is kept with the socket
 * (process.h): whose it is, when it began, and its retransmissions by cause.
 *
 * The kernel skips a run of a tracepoint's program that would interrupt itself on its CPU: measured, 6 of 4,727. So
 * each program is attached twice, and acts on a socket once: the second run finds what the first one has done.
 */
#ifndef REBPF_FLOW_H
#define REBPF_FLOW_H

/* All of the counters or none. */
#define HAS_COUNTERS                                                                                                 \
	(HAS_tcp_sock_segs_out && HAS_tcp_sock_data_segs_out && HAS_tcp_sock_segs_in && HAS_tcp_sock_data_segs_in && \
	 HAS_tcp_sock_bytes_sent && HAS_tcp_sock_bytes_retrans && HAS_tcp_sock_bytes_acked &&                        \
	 HAS_tcp_sock_bytes_received && HAS_tcp_sock_total_retrans && HAS_tcp_sock_delivered &&                      \
	 HAS_tcp_sock_delivered_ce && HAS_tcp_sock_dsack_dups && HAS_tcp_sock_reord_seen &&                          \
	 HAS_tcp_sock_rcv_ooopack && HAS_tcp_sock_chrono_stat && HAS_tcp_sock_chrono_start &&                        \
	 HAS_tcp_sock_chrono_type)

static __always_inline void forget_retransmissions(struct flow_state *state)
{
	__builtin_memset(state->retrans, 0, sizeof(state->retrans));
	state->seen_retrans = 0;
	state->unseen = 0;
	state->counted_unseen = 0;
}

static __always_inline void begin_flow(struct tcp_sock *tp, u32 role)
{
	struct flow_state *state = create_state(tp);

	if (!state)
		return;
	state->start_ns = bpf_ktime_get_ns();
	state->established_ns = 0;
	state->closed = false;
	state->role = role;
	forget_retransmissions(state);
}

/* A new socket for an acknowledged SYN-ACK, or for a SYN with TCP Fast Open, begins with its listener's process. */
static __always_inline void accept_flow(struct tcp_sock *tp)
{
	delete_state(tp);
	begin_flow(tp, ROLE_SERVER);
}

/*
 * Until an accepted socket is established, only SYN-ACKs are retransmitted, which the kernel counts for its request. With
 * TCP Fast Open, its process may close it before.
 */
static __always_inline void end_handshake(struct tcp_sock *tp)
{
	struct flow_state *state = find_state(tp);

	if (!state || state->role != ROLE_SERVER)
		return;
	if (!state->established_ns)
		state->established_ns = bpf_ktime_get_ns();
	state->retrans[CAUSE_SYN_ACK] = state->seen_retrans = READ_IF(tcp_sock, tp, total_retrans);
}

static __always_inline void establish_flow(struct tcp_sock *tp)
{
	struct flow_state *state = find_state(tp);

	if (state && !state->established_ns)
		state->established_ns = bpf_ktime_get_ns();
}

static __always_inline int count_retransmission(struct tcp_sock *tp, const struct sk_buff *skb)
{
	struct flow_state *state = create_state(tp);
	const struct tcp_skb_cb *cb = (const void *)skb->cb;
	u32 segs = READ(cb, tcp_gso_segs), total = READ_IF(tcp_sock, tp, total_retrans);

	if (!state || state->seen_retrans == total)
		return 0;
	state->seen_retrans = total;
	state->retrans[cause_of(READ(cb, tcp_flags), ca_state_of(tp), tp) & 7] += segs ? segs : 1;
	return 0;
}

/* The agent's own connections have no records. `rules` are the active ones. */
static __always_inline bool choose_flow(struct flow *flow, struct tcp_sock *tp, u64 rules, u32 tcp_state)
{
	struct sock *sk = (struct sock *)tp;
	u64 cookie = traced_cookie(sk);

	if (whose(cookie))
		return false;
	flow->hook = HOOK_RAW_TP;
	fill_endpoints(flow, (const struct sock_common *)sk, from_be16(READ(tp, inet_sport)));
	fill_owner(flow, sk, cookie);
	return keeps_flow(rules, flow, sk, tcp_state);
}

static __always_inline void fill_state(struct flow_event *e, const struct flow_state *state)
{
	if (state->process.pid) {
		e->pid = state->process.pid;
		__builtin_memcpy(e->comm, state->process.comm, sizeof(e->comm));
		e->known |= KNOWN_PROCESS;
	}
	e->role = state->role;
	if (state->role)
		e->known |= KNOWN_ROLE;
	if (state->role == ROLE_CLIENT || state->established_ns || e->state == TCP_SYN_RECV)
		e->start_ns = state->start_ns; /* otherwise no program has seen it yet, and it is the listener's */
	if (e->start_ns)
		e->known |= KNOWN_START_NS;
	if (state->role == ROLE_CLIENT && state->established_ns) {
		e->connect_us = (state->established_ns - state->start_ns) / 1000;
		e->known |= KNOWN_CONNECT_US;
	}
	e->retrans_rto = state->retrans[CAUSE_RTO];
	e->retrans_fast = state->retrans[CAUSE_FAST];
	e->retrans_slow_start = state->retrans[CAUSE_SLOW_START];
	e->retrans_tlp = state->retrans[CAUSE_TLP];
	e->retrans_syn = state->retrans[CAUSE_SYN];
	e->retrans_syn_ack = state->retrans[CAUSE_SYN_ACK];
}

#if HAS_COUNTERS
#ifdef chrono_type_bits /* a bit field on some kernels */
#define CHRONO_TYPE(tp) chrono_type_bits(READ(tp, chrono_type_byte))
#else
#define CHRONO_TYPE(tp) READ(tp, chrono_type)
#endif

/* The times that limited the sender, as tcp_get_info_chrono_stats; the current one is still running. */
static __always_inline void fill_chrono(struct flow_event *e, const struct tcp_sock *tp)
{
	u32 type = CHRONO_TYPE(tp);
	u32 running = type ? (u32)bpf_jiffies64() - READ(tp, chrono_start) : 0;
	u32 busy = READ(tp, chrono_stat[0]), rwnd = READ(tp, chrono_stat[1]), sndbuf = READ(tp, chrono_stat[2]);

	rwnd += type == 2 ? running : 0;
	sndbuf += type == 3 ? running : 0;
	busy += type == 1 ? running : 0;
	e->busy_time_us = jiffies_to_us(busy) + jiffies_to_us(rwnd) + jiffies_to_us(sndbuf);
	e->rwnd_limited_us = jiffies_to_us(rwnd);
	e->sndbuf_limited_us = jiffies_to_us(sndbuf);
}

static __always_inline void fill_counters(struct flow_event *e, const struct tcp_sock *tp)
{
	u32 causes;

	e->segs_out = READ(tp, segs_out);
	e->data_segs_out = READ(tp, data_segs_out);
	e->segs_in = READ(tp, segs_in);
	e->data_segs_in = READ(tp, data_segs_in);
	e->bytes_sent = READ(tp, bytes_sent);
	e->bytes_retrans = READ(tp, bytes_retrans);
	e->bytes_acked = READ(tp, bytes_acked);
	e->bytes_received = READ(tp, bytes_received);
	e->total_retrans = READ(tp, total_retrans);
	e->delivered = READ(tp, delivered);
	e->delivered_ce = READ(tp, delivered_ce);
	e->dsack_dups = READ(tp, dsack_dups);
	e->reord_seen = READ(tp, reord_seen);
	e->rcv_ooopack = READ(tp, rcv_ooopack);
	/* The rest no program has seen: before the programs were attached, or failed in the host before Linux 6.17. */
	causes = e->retrans_rto + e->retrans_fast + e->retrans_slow_start + e->retrans_tlp + e->retrans_syn +
		 e->retrans_syn_ack;
	e->retrans_other = e->total_retrans > causes ? e->total_retrans - causes : 0;
	fill_chrono(e, tp);
	e->known |= KNOWN_COUNTERS;
}
#endif

static __always_inline void fill_rates(struct flow_event *e, const struct tcp_sock *tp)
{
#if HAS_tcp_sock_rtt_min
	/* The first of the minima: a time stamp, then the value; all ones before the first measurement. */
	bpf_probe_read_kernel(&e->min_rtt_us, sizeof(e->min_rtt_us), (const u8 *)&tp->rtt_min + 4);
	if (e->min_rtt_us != ~0u)
		e->known |= KNOWN_MIN_RTT_US;
	else
		e->min_rtt_us = 0;
#endif
#if HAS_tcp_sock_rate_delivered && HAS_tcp_sock_rate_interval_us
	u32 interval = READ(tp, rate_interval_us);

	if (interval && HAS_TCP) {
		e->delivery_rate = (u64)READ(tp, rate_delivered) * e->mss * 1000000 / interval;
		e->known |= KNOWN_DELIVERY_RATE;
	}
#endif
#if HAS_sock_sk_pacing_rate
	e->pacing_rate = READ((const struct sock *)tp, sk_pacing_rate);
	if (e->pacing_rate != ~0ULL) /* not limited */
		e->known |= KNOWN_PACING_RATE;
	else
		e->pacing_rate = 0;
#endif
#if HAS_tcp_sock_icsk_ca_ops && HAS_tcp_congestion_ops_name
	const struct tcp_congestion_ops *ops = READ(tp, icsk_ca_ops);

	if (ops) {
		bpf_probe_read_kernel(e->cc, sizeof(e->cc), &ops->name);
		e->known |= KNOWN_CC;
	}
#endif
}

static __always_inline void fill_gauges(struct flow_event *e, const struct tcp_sock *tp)
{
	e->ca_state = ca_state_of(tp);
	if (HAS_tcp_sock_icsk_ca_state)
		e->known |= KNOWN_CA_STATE;
	if (HAS_TCP) {
		e->srtt_us = READ_IF(tcp_sock, tp, srtt_us) >> 3;
		e->mdev_us = READ_IF(tcp_sock, tp, mdev_us) >> 2;
		e->rto_us = jiffies_to_us(READ_IF(tcp_sock, tp, icsk_rto));
		e->snd_cwnd = READ_IF(tcp_sock, tp, snd_cwnd);
		e->snd_ssthresh = READ_IF(tcp_sock, tp, snd_ssthresh);
		e->snd_wnd = READ_IF(tcp_sock, tp, snd_wnd);
		e->rcv_wnd = READ_IF(tcp_sock, tp, rcv_wnd);
		e->mss = READ_IF(tcp_sock, tp, mss_cache);
		e->known |= KNOWN_TCP;
	}
	fill_rates(e, tp);
}

/*
 * Only at a close: a live connection's is a report that the process has not read yet. A connect that found no free port is
 * over before it has one, and its error is only returned to the process. Until a SYN is sent, the socket has the error of
 * its earlier connection.
 */
static __always_inline void fill_error(struct flow_event *e, const struct tcp_sock *tp)
{
	if (e->state != TCP_SYN_SENT || e->segs_out || !HAS_COUNTERS)
		e->error = READ_IF(sock, (const struct sock *)tp, sk_err);
	if (!e->error && e->state == TCP_SYN_SENT && !e->flow.sport)
		e->error = EADDRNOTAVAIL;
	if (e->error)
		e->known |= KNOWN_ERROR;
}

/* NULL: no record, because the ring is full, which is counted. */
static __always_inline struct flow_event *reserve_flow(const struct flow *flow, u64 rules)
{
	int stream = STREAM_FLOW;
	struct counters *counter = counters.lookup(&stream);
	struct flow_event *e;
	u64 seq;

	if (!counter)
		return NULL;
	seq = next_seq(counter, stream);
	e = flow_pipe.ringbuf_reserve(sizeof(*e));
	if (!e) {
		count_ring_full(counter);
		return NULL;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->flow = *flow;
	e->ts = bpf_ktime_get_ns();
	e->cpu_seq = seq;
	e->cpu = bpf_get_smp_processor_id();
	e->sample_rate = 1;
	e->rules_version = rules >> 1;
	return e;
}

#if RETRANSMIT_RAW_TP && HAS_COUNTERS
/*
 * Counts as lost what no program has seen (docs/truth.md), if the record before had it, too: the kernel counts a
 * retransmission shortly before its tracepoint. What an older connection has had at first is not lost.
 */
static __always_inline void count_unseen(struct flow_state *state, const struct flow_event *e)
{
	u32 other = state->retrans[CAUSE_OTHER], unseen = e->retrans_other > other ? e->retrans_other - other : 0;
	u32 before = state->unseen ? state->unseen - 1 : 0, sure = unseen;
	int stream = STREAM_RETRANSMIT;
	struct counters *counter = counters.lookup(&stream);

	if (!state->unseen && !state->start_ns)
		state->counted_unseen = unseen;
	state->unseen = unseen + 1;
	if (e->reason != REASON_CLOSE && before < sure)
		sure = before;
	if (!counter || sure <= state->counted_unseen)
		return;
	__sync_fetch_and_add(&counter->forgotten, sure - state->counted_unseen);
	state->counted_unseen = sure;
}
#endif

/* `tcp_state` is the one before a close. `state` may be NULL: nothing is known about the beginning. */
static __always_inline int take_flow(struct tcp_sock *tp, struct flow_state *state, u32 tcp_state, u8 reason)
{
	struct flow flow = {};
	u64 rules = active_rules();
	struct flow_event *e;

	if (!choose_flow(&flow, tp, rules, tcp_state))
		return 0;
	e = reserve_flow(&flow, rules);
	if (!e)
		return 0;
	e->reason = reason;
	e->state = tcp_state;
	if (state)
		fill_state(e, state);
#if HAS_COUNTERS
	fill_counters(e, tp);
#endif
#if RETRANSMIT_RAW_TP && HAS_COUNTERS
	if (state)
		count_unseen(state, e);
#endif
	fill_gauges(e, tp);
	if (reason == REASON_CLOSE)
		fill_error(e, tp);
	flow_pipe.ringbuf_submit(e, wakeup(STREAM_FLOW, e->cpu_seq, NO_WAKEUP));
	return 0;
}

/*
 * Whether a socket in this state is a connection. A socket that was created for an acknowledgement and given up before it
 * was established is none, except with TCP Fast Open, where it may have carried data. A reset has removed the request of
 * such a connection before it closes.
 */
static __always_inline bool is_connection(const struct tcp_sock *tp, const struct flow_state *state, u32 tcp_state)
{
	if (tcp_state == TCP_CLOSE || tcp_state == TCP_LISTEN)
		return false;
	if (tcp_state != TCP_SYN_RECV || (state && state->role == ROLE_CLIENT))
		return true;
	return fast_open_request(tp) || READ_IF(tcp_sock, tp, bytes_received);
}

/* Without memory for a state, only the first of both programs takes the record. */
static __always_inline void close_flow(struct tcp_sock *tp, u32 old_state, bool first)
{
	struct flow_state *state = create_state(tp);

	if (state ? state->closed : !first) {
		delete_state(tp);
		return;
	}
	if (state)
		state->closed = true;
	if (is_connection(tp, state, old_state))
		take_flow(tp, state, old_state, REASON_CLOSE);
}

static __always_inline int follow_flow(struct tcp_sock *tp, u32 old_state, u32 new_state, bool first)
{
	if (new_state == TCP_SYN_SENT)
		begin_flow(tp, ROLE_CLIENT);
	else if (new_state == TCP_LISTEN)
		begin_flow(tp, ROLE_SERVER);
	else if (new_state == TCP_SYN_RECV && old_state == TCP_LISTEN)
		accept_flow(tp);
	else if (old_state == TCP_SYN_RECV)
		end_handshake(tp);
	if (new_state == TCP_ESTABLISHED)
		establish_flow(tp);
	if (new_state == TCP_CLOSE && old_state != TCP_CLOSE)
		close_flow(tp, old_state, first);
	return 0;
}

/* One of the sockets with a state: an interval record, if it is a connection. */
static __always_inline int visit_flow(struct sock *sk, struct flow_state *state)
{
	struct tcp_sock *tp = sk && state ? bpf_skc_to_tcp_sock(sk) : NULL;
	u32 tcp_state;

	if (!tp || state->closed)
		return 0;
	tcp_state = READ((const struct sock *)tp, skc_state);
	return is_connection(tp, state, tcp_state) ? take_flow(tp, state, tcp_state, REASON_INTERVAL) : 0;
}

#if HAS_TRACING_STORAGE
/* The socket of a task's open file. Several tasks may have it open: the first one counts. */
static __always_inline void visit_file(struct bpf_iter_meta *meta, struct file *file)
{
	struct socket *socket = file ? bpf_sock_from_file(file) : NULL;
	struct sock *sk = socket ? socket->sk : NULL;
	struct tcp_sock *tp = sk ? bpf_skc_to_tcp_sock(sk) : NULL;
	struct flow_state *state = tp ? find_state(tp) : NULL;

	if (!state || state->visit == meta->session_id)
		return;
	state->visit = meta->session_id;
	visit_flow(sk, state);
}
#endif

/* Writes a byte for each object: a read of n bytes visits n objects. */
static __always_inline void count_visit(struct bpf_iter_meta *meta)
{
	u8 visit = 0;

	bpf_seq_write(meta->seq, &visit, sizeof(visit));
}

#endif
