/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Fills events from the kernel's structs. Differences between kernels and between hooks are handled here:
 * HAS_<struct>_<member> is 1 if the running kernel has a member.
 *
 * The functions return the bits of segment.known for what they have filled. The caller writes them once, because
 * to change them in the record costs 27 ns more: a load from the ring waits for its memory.
 */
#ifndef REBPF_FILL_H
#define REBPF_FILL_H

#define AF_INET6 10
#define SOCK_RAW 3
#define TCPHDR_FIN 0x01
#define TCPHDR_SYN 0x02
#define TCPHDR_PSH 0x08
#define TCPHDR_ACK 0x10
#define TCPHDR_URG 0x20
#define TCP_SYN_RECV 3
#define TCP_LISTEN 10
#define TCP_CA_RECOVERY 3
#define TCP_CA_LOSS 4
#define ICSK_TIME_LOSS_PROBE 5
#define EADDRNOTAVAIL 99
#define ENOBUFS 105

/*
 * bcc inserts this helper for reads that it rewrites. Without root it assumes a kernel before 5.5, whose only helper is
 * forbidden in cgroup programs.
 */
#define bpf_probe_read bpf_probe_read_kernel

/*
 * READ() uses a BTF pointer, which the verifier checks and the kernel guards. With the kprobe hook, whose pointers have no
 * type, it uses bpf_probe_read_kernel, as PROBE() always does. The value of a statement expression has the member's type
 * without const.
 */
#define PROBE(pointer, member)                                                      \
	({                                                                          \
		typeof(({ (pointer)->member; })) _value = 0;                        \
		bpf_probe_read_kernel(&_value, sizeof(_value), &(pointer)->member); \
		_value;                                                             \
	})
#if PROBE_READ
#define READ(pointer, member) PROBE(pointer, member)
#else
#define READ(pointer, member) ((pointer)->member)
#endif

/* READ_IF(tcp_sock, tp, snd_cwnd): the member's value, or 0 if this kernel's struct lacks it. */
#define READ_IF(type, pointer, member) READ_IF_(HAS_##type##_##member, pointer, member)
#define READ_IF_(has, pointer, member) READ_IF__(has, pointer, member)
#define READ_IF__(has, pointer, member) READ_IF_##has(pointer, member)
#define READ_IF_0(pointer, member) 0
#define READ_IF_1(pointer, member) READ(pointer, member)

/* The loader puts the kernel's HZ in place of the mark, so that programs can be compiled on another machine. */
static __always_inline u64 jiffies_to_us(u32 jiffies)
{
	u64 hz;

	asm("%0 = %1 ll" : "=r"(hz) : "i"(HZ_MARK));
	return (u64)jiffies * 1000000 / hz;
}

/* All of TCP_FIELDS or none: a field that this kernel cannot provide must not look like a 0. */
#define HAS_TCP                                                                                                       \
	(HAS_tcp_sock_srtt_us && HAS_tcp_sock_mdev_us && HAS_tcp_sock_icsk_rto && HAS_tcp_sock_snd_cwnd &&            \
	 HAS_tcp_sock_snd_ssthresh && HAS_tcp_sock_packets_out && HAS_tcp_sock_sacked_out && HAS_tcp_sock_lost_out && \
	 HAS_tcp_sock_retrans_out && HAS_tcp_sock_total_retrans && HAS_tcp_sock_snd_wnd && HAS_tcp_sock_rcv_wnd &&    \
	 HAS_tcp_sock_mss_cache)

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

/* Addresses and ports of a socket, or of a request, which begins with the same sock_common. */
static __always_inline void fill_endpoints(struct flow *flow, const struct sock_common *sk, u16 sport)
{
	flow->sport = sport;
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

static __always_inline u32 netns_of(const struct sock *sk)
{
	const struct net *net = READ(sk, skc_net);

	return READ(net, ns_inum);
}

/*
 * The address of a raw socket or a request, which is the value of the verifier's pointer. Some kernels'
 * bpf_skc_to_tcp_sock() accepts a raw socket as TCP's and others' does not (docs/decisions.md).
 */
static __always_inline const struct sock *address_of(struct bpf_sock *found)
{
	const struct sock *sk = NULL;

	bpf_probe_read_kernel(&sk, sizeof(sk), &found);
	return sk;
}

/* TCP's own raw socket receives nothing, so it is in no table. Those of processes are in the table of raw sockets. */
static __always_inline bool is_of_process(const struct sock *raw)
{
#if HAS_sock_skc_node_pprev
	return PROBE(raw, skc_node_pprev) != NULL;
#else
	return false;
#endif
}

#define HAS_OWNER_CGROUP ((HAS_sock_sk_cgroup || HAS_sock_sk_cgroup_val) && HAS_cgroup_kn && HAS_kernfs_node_id)

#if HAS_OWNER_CGROUP
/* NULL if unknown. Before Linux 5.15 the two lowest bits say that net_cls or net_prio use the field otherwise. */
static __always_inline const struct cgroup *cgroup_of(const struct sock *sk)
{
#if HAS_sock_sk_cgroup
	return PROBE(sk, sk_cgroup);
#else
	u64 value = PROBE(sk, sk_cgroup_val);

	return value & 3 ? NULL : (const struct cgroup *)value;
#endif
}
#endif

/* Creates the cookie if there is none yet. Before Linux 5.12 a tracing program can only read it: 0 if there is none. */
static __always_inline u64 traced_cookie(struct sock *sk)
{
#if HAS_TRACING_COOKIE
	return bpf_get_socket_cookie(sk);
#else
	return READ_IF(sock, sk, skc_cookie);
#endif
}

/* The members of a flow that are constant for a socket. */
struct owner {
	u64 sk_cookie;
	u64 cgroup_id;
	u32 netns;
	u32 uid;
	u8 flow_known;
	u8 _pad[7];
};

static __always_inline void set_owner(struct flow *flow, const struct owner *owner)
{
	flow->sk_cookie = owner->sk_cookie;
	flow->cgroup_id = owner->cgroup_id;
	flow->netns = owner->netns;
	flow->uid = owner->uid;
	flow->flow_known = owner->flow_known;
}

static __always_inline void get_owner(struct owner *owner, const struct flow *flow)
{
	owner->sk_cookie = flow->sk_cookie;
	owner->cgroup_id = flow->cgroup_id;
	owner->netns = flow->netns;
	owner->uid = flow->uid;
	owner->flow_known = flow->flow_known;
}

/* The owner of the socket, never of the task that happens to run. `cookie` is 0 for a listener. */
static __always_inline void fill_owner(struct flow *flow, const struct sock *sk, u64 cookie)
{
	flow->netns = netns_of(sk);
	flow->sk_cookie = cookie;
	if (cookie)
		flow->flow_known |= KNOWN_SK_COOKIE;
	flow->uid = READ_IF(sock, sk, sk_uid);
	if (HAS_sock_sk_uid)
		flow->flow_known |= KNOWN_UID;
#if HAS_OWNER_CGROUP
	const struct cgroup *cgroup = cgroup_of(sk);
	const struct kernfs_node *node = PROBE(cgroup, kn);

	flow->cgroup_id = PROBE(node, id);
	if (flow->cgroup_id)
		flow->flow_known |= KNOWN_CGROUP_ID;
#endif
}

static __always_inline u8 ca_state_of(const struct tcp_sock *tp)
{
#if HAS_tcp_sock_icsk_ca_state
	return icsk_ca_state_bits(READ(tp, icsk_ca_state_byte));
#else
	return 0;
#endif
}

static __always_inline u32 fill_tcp(struct segment *s, const struct tcp_sock *tp)
{
	u32 known = HAS_tcp_sock_icsk_ca_state ? KNOWN_CA_STATE : 0;

	s->state = READ((const struct sock *)tp, skc_state);
	s->ca_state = ca_state_of(tp);
	if (!HAS_TCP)
		return known;
	s->srtt_us = READ_IF(tcp_sock, tp, srtt_us) >> 3;
	s->mdev_us = READ_IF(tcp_sock, tp, mdev_us) >> 2;
	s->rto_us = jiffies_to_us(READ_IF(tcp_sock, tp, icsk_rto));
	s->snd_cwnd = READ_IF(tcp_sock, tp, snd_cwnd);
	s->snd_ssthresh = READ_IF(tcp_sock, tp, snd_ssthresh);
	s->packets_out = READ_IF(tcp_sock, tp, packets_out);
	s->sacked_out = READ_IF(tcp_sock, tp, sacked_out);
	s->lost_out = READ_IF(tcp_sock, tp, lost_out);
	s->retrans_out = READ_IF(tcp_sock, tp, retrans_out);
	s->total_retrans = READ_IF(tcp_sock, tp, total_retrans);
	s->snd_wnd = READ_IF(tcp_sock, tp, snd_wnd);
	s->rcv_wnd = READ_IF(tcp_sock, tp, rcv_wnd);
	s->mss = READ_IF(tcp_sock, tp, mss_cache);
	return known | KNOWN_TCP;
}

static __always_inline u32 control_length(u8 tcp_flags)
{
	return !!(tcp_flags & TCPHDR_SYN) + !!(tcp_flags & TCPHDR_FIN);
}

/* Whether the urgent pointer is in reach of a segment. __tcp_transmit_skb sets the flag in the header only. */
static __always_inline bool is_urgent(const struct tcp_sock *tp, u32 seq)
{
	u32 up = READ(tp, snd_up);

	if (READ(tp, snd_una) == up || (s32)(seq - up) >= 0)
		return false;
	return up - seq < 0x10000 || (s32)(seq + 0xffff - READ(tp, snd_nxt)) > 0;
}

/*
 * Fills from TCP's control block of an skb that is about to be sent, or was. The block has the flags that TCP chose when
 * it queued the data: ECE and CWR are set later, in the header only. The caller provides the acknowledgement number.
 */
static __always_inline u32 fill_from_cb(struct segment *s, const struct tcp_sock *tp, const struct sk_buff *skb,
					u32 ack_seq)
{
	const struct tcp_skb_cb *cb = (const void *)skb->cb;
	u32 segs = READ(cb, tcp_gso_segs);

	s->tcp_flags = READ(cb, tcp_flags);
	if (segs > 1) /* since Linux 5.4, TCP sets it in the header of every super-segment */
		s->tcp_flags |= TCPHDR_PSH;
	if (is_urgent(tp, READ(cb, seq)))
		s->tcp_flags |= TCPHDR_URG;
	s->seq = READ(cb, seq);
	s->end_seq = READ(cb, end_seq);
	s->ack_seq = ack_seq;
	s->payload_len = s->end_seq - s->seq - control_length(s->tcp_flags);
	s->segs = segs ? segs : 1;
	return KNOWN_ACK_SEQ;
}

/* At the probe, a SYN-ACK has no skb yet, or no longer: everything comes from its request. */
static __always_inline u32 fill_from_request(struct segment *s, const struct request_sock *req)
{
	const struct tcp_request_sock *treq = (const void *)req;

	s->tcp_flags = TCPHDR_SYN | TCPHDR_ACK;
	s->seq = PROBE(treq, snt_isn);
	s->end_seq = s->seq + 1;
	s->ack_seq = PROBE(treq, rcv_nxt);
	s->segs = 1;
	s->state = TCP_SYN_RECV;
	return KNOWN_ACK_SEQ;
}

/* Whether it has data, SYN or FIN below snd_nxt, which only advances after a first transmission. */
static __always_inline bool is_sent_before(const struct tcp_sock *tp, u32 seq, u32 end_seq)
{
	return end_seq != seq && (s32)(seq - READ(tp, snd_nxt)) < 0;
}

/*
 * Whether it is the first SYN-ACK of a connection that both sides open at once: the SYN, with ACK set. The kernel does not
 * count it as a retransmission. It counts those by the timer, which clears icsk_pending before.
 */
static __always_inline bool is_answer_to_syn(const struct tcp_sock *tp, u8 tcp_flags)
{
	u8 pending = READ_IF(tcp_sock, tp, icsk_pending);

	return tcp_flags & TCPHDR_SYN && tcp_flags & TCPHDR_ACK && pending;
}

static __always_inline bool is_retransmission(const struct tcp_sock *tp, u32 seq, u32 end_seq, u8 tcp_flags)
{
	return is_sent_before(tp, seq, end_seq) && !is_answer_to_syn(tp, tcp_flags);
}

static __always_inline u32 fill_is_retransmit(struct transmit_event *e, const struct tcp_sock *tp)
{
	e->is_retransmit = is_retransmission(tp, e->s.seq, e->s.end_seq, e->s.tcp_flags);
	return KNOWN_IS_RETRANSMIT;
}

/*
 * In the state Loss, a timeout has just cleared the hint of what to retransmit, and an acknowledgement that allows more to
 * be sent has set it. icsk_pending does not tell them apart: an ICMP error may bring the timeout forward.
 */
static __always_inline u8 cause_of(u8 tcp_flags, u8 ca_state, const struct tcp_sock *tp)
{
	if (tcp_flags & TCPHDR_SYN)
		return CAUSE_SYN;
	if (!HAS_tcp_sock_icsk_ca_state)
		return CAUSE_OTHER;
	if (ca_state == TCP_CA_RECOVERY)
		return CAUSE_FAST;
	if (ca_state != TCP_CA_LOSS)
		return READ_IF(tcp_sock, tp, icsk_pending) == ICSK_TIME_LOSS_PROBE ? CAUSE_TLP : CAUSE_OTHER;
	if (!HAS_tcp_sock_retransmit_skb_hint)
		return CAUSE_OTHER;
	return READ_IF(tcp_sock, tp, retransmit_skb_hint) ? CAUSE_SLOW_START : CAUSE_RTO;
}

static __always_inline u32 fill_cause(struct retransmit_event *e, const struct tcp_sock *tp, bool is_loss_probe)
{
	e->cause = is_loss_probe ? CAUSE_TLP : cause_of(e->s.tcp_flags, e->s.ca_state, tp);
	if (!HAS_tcp_sock_icsk_retransmits || (e->cause != CAUSE_RTO && e->cause != CAUSE_SYN))
		return 0;
	if (e->cause == CAUSE_RTO && HAS_TCP && !e->s.snd_wnd && READ((const struct sock *)tp, sk_socket))
		return 0; /* the receiver has closed its window: a probe, unless no process has the socket any more */
	e->retransmit_no = READ_IF(tcp_sock, tp, icsk_retransmits);
	return e->retransmit_no ? KNOWN_RETRANSMIT_NO : 0;
}

/* `number`: the 1-based retransmission number of the SYN-ACK; 0 if unknown. */
static __always_inline u32 fill_synack_cause(struct retransmit_event *e, u32 number)
{
	e->cause = CAUSE_SYN_ACK;
	e->retransmit_no = number;
	return number ? KNOWN_RETRANSMIT_NO : 0;
}

/* The request counts its retransmissions; `behind` is 1 if it has not counted this one yet. */
static __always_inline u32 synack_number(const struct request_sock *req, u32 behind)
{
#if HAS_request_sock_num_retrans
	return PROBE(req, num_retrans) + behind;
#else
	return 0;
#endif
}

/* TCP Fast Open creates the connection before the handshake is over; until then the connection has the request. */
static __always_inline const struct tcp_request_sock *fast_open_request(const struct tcp_sock *tp)
{
	return (const void *)READ_IF(tcp_sock, tp, fastopen_rsk);
}

/*
 * Whether the kernel stopped before it counted a retransmission: all other errors are failed retransmissions. The host's
 * firewall and routing may answer with the last three, too; then the segment has the time of this attempt.
 */
static __always_inline bool gave_up(s32 err, const struct tcp_sock *tp, const struct sk_buff *skb)
{
	if (err == -16 /* EBUSY: still in the host's queue */ || err == -11 /* EAGAIN: window closed */)
		return true;
	if (err != -22 /* EINVAL */ && err != -12 /* ENOMEM */ && err != -113 /* EHOSTUNREACH: no route */)
		return false;
	return (u64)READ(skb, tstamp) < READ(tp, tcp_clock_cache);
}

/* A queue that drops the packet returns a positive code (NET_XMIT_DROP). */
static __always_inline s32 errno_of(s32 err)
{
	return err > 0 ? -ENOBUFS : err;
}

#endif
