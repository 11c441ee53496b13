/* SPDX-License-Identifier: GPL-2.0 */
/*
 * From the kernel's structs to an event. Differences between kernels and between rungs are here: HAS_<struct>_<member> says
 * whether the running kernel has a member; READ() reads through a BTF pointer, which the verifier checks and the kernel
 * guards, or on the kprobe rung, whose pointers have no type, by bpf_probe_read_kernel.
 */
#ifndef REBPF_FILL_H
#define REBPF_FILL_H

#define AF_INET6 10
#define TCPHDR_FIN 0x01
#define TCPHDR_SYN 0x02
#define TCP_SYN_RECV 3
#define TCP_CA_RECOVERY 3
#define TCP_CA_LOSS 4
#define ICSK_TIME_LOSS_PROBE 5

/* The value of a statement expression has the member's type without its const. */
#define PROBE(pointer, member)                                                                   \
	({                                                                                       \
		typeof(({ (pointer)->member; })) _value = 0;                                     \
		bpf_probe_read_kernel(&_value, sizeof(_value), &(pointer)->member);              \
		_value;                                                                          \
	})
#if PROBE_READ
#define READ(pointer, member) PROBE(pointer, member)
#else
#define READ(pointer, member) ((pointer)->member)
#endif

static __always_inline u16 from_be16(u16 value)
{
	return __builtin_bswap16(value);
}

static __always_inline void fill_v4(u8 *to, u32 address)
{
	__builtin_memset(to, 0, 10);
	to[10] = 0xff;
	to[11] = 0xff;
	__builtin_memcpy(to + 12, &address, 4);
}

static __always_inline void fill_v6(u8 *to, const u32 *words)
{
	__builtin_memcpy(to, words, 16);
}

/* Addresses and ports of a socket or, since it begins with the same sock_common, of a request. */
static __always_inline void fill_endpoints(struct flow *flow, const struct sock_common *sk)
{
	flow->sport = READ(sk, skc_num);
	flow->dport = from_be16(READ(sk, skc_dport));
#if HAS_sock_common_skc_v6_daddr
	if (READ(sk, skc_family) == AF_INET6) {
		u32 words[4];

#pragma unroll
		for (int i = 0; i < 4; i++)
			words[i] = READ(sk, skc_v6_rcv_saddr[i]);
		fill_v6(flow->saddr, words);
#pragma unroll
		for (int i = 0; i < 4; i++)
			words[i] = READ(sk, skc_v6_daddr[i]);
		fill_v6(flow->daddr, words);
		return;
	}
#endif
	fill_v4(flow->saddr, READ(sk, skc_rcv_saddr));
	fill_v4(flow->daddr, READ(sk, skc_daddr));
}

/* Whose: of the socket, and never of the task that happens to run. */
static __always_inline void fill_owner(struct flow *flow, const struct sock *sk)
{
	const struct net *net = READ(sk, skc_net);

	flow->netns = READ(net, ns_inum);
	flow->uid = READ(sk, sk_uid);
	flow->flow_known |= KNOWN_UID;
#if HAS_sock_sk_cgroup
	const struct cgroup *cgroup = READ(sk, sk_cgroup);
	const struct kernfs_node *node = READ(cgroup, kn);

	flow->cgroup_id = READ(node, id);
	if (flow->cgroup_id)
		flow->flow_known |= KNOWN_CGROUP_ID;
#endif
}

static __always_inline void set_cookie(struct flow *flow, u64 cookie)
{
	flow->sk_cookie = cookie;
	if (cookie)
		flow->flow_known |= KNOWN_SK_COOKIE;
}

static __always_inline u8 ca_state_of(const struct tcp_sock *tp)
{
	return icsk_ca_state_bits(READ(tp, icsk_ca_state_byte));
}

static __always_inline void fill_tcp(struct segment *s, const struct tcp_sock *tp)
{
	s->state = READ((const struct sock *)tp, skc_state);
	s->ca_state = ca_state_of(tp);
	s->srtt_us = READ(tp, srtt_us) >> 3;
	s->mdev_us = READ(tp, mdev_us) >> 2;
	s->rto_us = READ(tp, icsk_rto) * (1000000 / HZ);
	s->snd_cwnd = READ(tp, snd_cwnd);
	s->snd_ssthresh = READ(tp, snd_ssthresh);
	s->packets_out = READ(tp, packets_out);
	s->sacked_out = READ(tp, sacked_out);
	s->lost_out = READ(tp, lost_out);
	s->retrans_out = READ(tp, retrans_out);
	s->total_retrans = READ(tp, total_retrans);
	s->snd_wnd = READ(tp, snd_wnd);
	s->rcv_wnd = READ(tp, rcv_wnd);
	s->mss = READ(tp, mss_cache);
	s->known |= KNOWN_CA_STATE | KNOWN_TCP;
}

/* TCP's control block of an skb of the write queue; the acknowledgement is the caller's: the block does not hold it here. */
static __always_inline void fill_from_cb(struct segment *s, const struct sk_buff *skb)
{
	const struct tcp_skb_cb *cb = (const void *)skb->cb;
	u32 segs = READ(cb, tcp_gso_segs);

	s->tcp_flags = READ(cb, tcp_flags);
	s->seq = READ(cb, seq);
	s->end_seq = READ(cb, end_seq);
	s->payload_len = s->end_seq - s->seq - !!(s->tcp_flags & TCPHDR_SYN) - !!(s->tcp_flags & TCPHDR_FIN);
	s->segs = segs ? segs : 1;
}

/* A SYN-ACK has no skb yet, or none any more, where it is seen: its request says all. */
static __always_inline void fill_from_request(struct segment *s, const struct request_sock *req)
{
	const struct tcp_request_sock *treq = (const void *)req;

	s->tcp_flags = 0x12;
	s->seq = PROBE(treq, snt_isn);
	s->end_seq = s->seq + 1;
	s->ack_seq = PROBE(treq, rcv_nxt);
	s->segs = 1;
	s->state = TCP_SYN_RECV;
	s->known |= KNOWN_ACK_SEQ;
}

/* Sent before: it has something to send, below what was sent so far. snd_nxt moves only after a first transmission. */
static __always_inline void fill_is_retransmit(struct transmit_event *e, const struct tcp_sock *tp)
{
	e->is_retransmit = e->s.end_seq != e->s.seq && (s32)(e->s.seq - READ(tp, snd_nxt)) < 0;
	e->s.known |= KNOWN_IS_RETRANSMIT;
}

static __always_inline u8 cause_of(const struct segment *s, const struct tcp_sock *tp)
{
	u8 pending = READ(tp, icsk_pending);

	if (s->tcp_flags & TCPHDR_SYN)
		return CAUSE_SYN;
	if (s->ca_state == TCP_CA_LOSS)
		return pending ? CAUSE_SLOW_START : CAUSE_RTO;
	if (s->ca_state == TCP_CA_RECOVERY)
		return CAUSE_FAST;
	return pending == ICSK_TIME_LOSS_PROBE ? CAUSE_TLP : CAUSE_OTHER;
}

static __always_inline void fill_cause(struct retransmit_event *e, const struct tcp_sock *tp)
{
	e->cause = cause_of(&e->s, tp);
	if (e->cause == CAUSE_RTO || e->cause == CAUSE_SYN) {
		e->retransmit_no = READ(tp, icsk_retransmits);
		e->s.known |= KNOWN_RETRANSMIT_NO;
	}
}

#endif
