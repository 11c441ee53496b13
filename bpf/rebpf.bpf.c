// SPDX-License-Identifier: GPL-2.0
/*
 * The programs: one per hook, three steps each: describe the flow and filter, reserve and fill, submit.
 *
 * bcc compiles this file, and each program is then loaded by name (producer/rungs.py). Only those of the chosen rungs are
 * compiled. A context is `void *` or `u64 *` on purpose: bcc rewrites what is reached through a typed one.
 */
#include "kernel.h"
#include "events.h"
#include "layout_check.h"
#include "maps.h"
#include "fill.h"
#include "filter.h"

/*
 * No wakeup: an interrupt for each event would cost the traced context more than the event does, and would invite the runs
 * that the kernel skips because a program would interrupt itself. The agent reads on a timer.
 */
#define SUBMIT_FLAGS 1 /* BPF_RB_NO_WAKEUP */

/* The event's number: taken also when the ring is full, so that a reader of the topic sees the gap. Atomic, because on the
 * cgroup hook a softirq may interrupt a run on the same CPU and run the program again. */
static __always_inline u64 next_seq(struct counters *counter)
{
	return __sync_fetch_and_add(&counter->passed, 1) + 1;
}

static __always_inline void begin(struct segment *s, const struct flow *flow, u64 cpu_seq)
{
	s->flow = *flow;
	s->ts = bpf_ktime_get_ns();
	s->cpu_seq = cpu_seq;
	s->cpu = bpf_get_smp_processor_id();
	s->sample_rate = 1;
}

static __always_inline struct transmit_event *reserve_transmit(const struct flow *flow)
{
	int stream = STREAM_TRANSMIT;
	struct counters *counter = counters.lookup(&stream);
	struct transmit_event *e;
	u64 seq;

	if (!counter)
		return NULL;
	seq = next_seq(counter);
	e = transmit_pipe.ringbuf_reserve(sizeof(*e));
	if (!e) {
		__sync_fetch_and_add(&counter->lost_ring_full, 1);
		return NULL;
	}
	__builtin_memset(e, 0, sizeof(*e));
	begin(&e->s, flow, seq);
	return e;
}

static __always_inline struct retransmit_event *reserve_retransmit(const struct flow *flow)
{
	int stream = STREAM_RETRANSMIT;
	struct counters *counter = counters.lookup(&stream);
	struct retransmit_event *e;
	u64 seq;

	if (!counter)
		return NULL;
	seq = next_seq(counter);
	e = retransmit_pipe.ringbuf_reserve(sizeof(*e));
	if (!e) {
		__sync_fetch_and_add(&counter->lost_ring_full, 1);
		return NULL;
	}
	__builtin_memset(e, 0, sizeof(*e));
	begin(&e->s, flow, seq);
	return e;
}

/* The flow of a full socket. The cookie is made where it does not exist, except by a kprobe, which can only read it. */
static __always_inline void describe(struct flow *flow, struct sock *sk, u8 hook)
{
	flow->hook = hook;
	fill_endpoints(flow, (const struct sock_common *)sk);
	fill_owner(flow, sk);
#if PROBE_READ
	set_cookie(flow, READ(sk, skc_cookie));
#else
	set_cookie(flow, bpf_get_socket_cookie(sk));
#endif
}

/* The flow of a SYN-ACK: the request's endpoints, the listener's owner, and no socket of its own yet. */
static __always_inline void describe_request(struct flow *flow, struct sock *listener, struct request_sock *req, u8 hook)
{
	flow->hook = hook;
	fill_endpoints(flow, (const struct sock_common *)req);
	fill_owner(flow, listener);
}

/* What the kernel gave up before it counted a retransmission; later errors are retransmissions that failed. */
static __always_inline bool gave_up(s32 err)
{
	return err == -16 /* EBUSY: still in the host's queue */ || err == -11 /* EAGAIN: window closed */ ||
	       err == -22 /* EINVAL */ || err == -12 /* ENOMEM */ || err == -113 /* EHOSTUNREACH */;
}

static __always_inline int take_transmit(struct sock *sk, struct tcp_sock *tp, struct sk_buff *skb, u32 rcv_nxt, u8 hook)
{
	struct flow flow = {};
	struct transmit_event *e;

	describe(&flow, sk, hook);
	if (!passes(&flow))
		return 0;
	e = reserve_transmit(&flow);
	if (!e)
		return 0;
	fill_from_cb(&e->s, skb);
	e->s.ack_seq = rcv_nxt;
	e->s.known |= KNOWN_ACK_SEQ;
	fill_tcp(&e->s, tp);
	fill_is_retransmit(e, tp);
	transmit_pipe.ringbuf_submit(e, SUBMIT_FLAGS);
	return 0;
}

static __always_inline int take_synack(struct sock *listener, struct request_sock *req, u8 hook)
{
	struct flow flow = {};
	struct transmit_event *e;

	describe_request(&flow, listener, req, hook);
	if (!passes(&flow))
		return 0;
	e = reserve_transmit(&flow);
	if (!e)
		return 0;
	fill_from_request(&e->s, req);
	transmit_pipe.ringbuf_submit(e, SUBMIT_FLAGS);
	return 0;
}

static __always_inline int take_retransmit(struct sock *sk, struct tcp_sock *tp, struct sk_buff *skb, s32 err, u8 hook)
{
	struct flow flow = {};
	struct retransmit_event *e;

	if (gave_up(err))
		return 0;
	describe(&flow, sk, hook);
	if (!passes(&flow))
		return 0;
	e = reserve_retransmit(&flow);
	if (!e)
		return 0;
	fill_from_cb(&e->s, skb);
	e->s.ack_seq = READ(tp, rcv_nxt);
	e->s.known |= KNOWN_ACK_SEQ;
	fill_tcp(&e->s, tp);
	fill_cause(e, tp);
	e->err = err;
	retransmit_pipe.ringbuf_submit(e, SUBMIT_FLAGS);
	return 0;
}

static __always_inline int take_synack_retransmit(struct sock *listener, struct request_sock *req, u8 hook)
{
	struct flow flow = {};
	struct retransmit_event *e;

	describe_request(&flow, listener, req, hook);
	if (!passes(&flow))
		return 0;
	e = reserve_retransmit(&flow);
	if (!e)
		return 0;
	fill_from_request(&e->s, req);
	e->cause = CAUSE_SYN_ACK;
	e->retransmit_no = PROBE(req, num_retrans) + REQUEST_COUNTS_LATER;
	e->s.known |= KNOWN_RETRANSMIT_NO;
	retransmit_pipe.ringbuf_submit(e, SUBMIT_FLAGS);
	return 0;
}

#if TRANSMIT_FENTRY
int fentry_tcp_transmit_skb(u64 *ctx)
{
	struct sock *sk = (void *)ctx[0];
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);

	return tp ? take_transmit(sk, tp, (void *)ctx[1], ctx[4], HOOK_FENTRY) : 0;
}

int fentry_tcp_make_synack(u64 *ctx)
{
	return take_synack((void *)ctx[0], (void *)ctx[2], HOOK_FENTRY);
}
#endif

#if RETRANSMIT_FENTRY
int fexit_tcp_retransmit_skb(u64 *ctx)
{
	struct sock *sk = (void *)ctx[0];
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);

	return tp ? take_retransmit(sk, tp, (void *)ctx[1], ctx[3], HOOK_FENTRY) : 0;
}

int fexit_tcp_rtx_synack(u64 *ctx)
{
	return ctx[2] ? 0 : take_synack_retransmit((void *)ctx[0], (void *)ctx[1], HOOK_FENTRY);
}
#endif

#if RETRANSMIT_RAW_TP
int raw_tp_tcp_retransmit_skb(u64 *ctx)
{
	struct sock *sk = (void *)ctx[0];
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	/* Linux 6.18 has the result as third argument and also fires for failures; before, it fired for successes alone. */
#if RETRANSMIT_TRACEPOINT_HAS_ERR
	s32 err = ctx[2];
#else
	s32 err = 0;
#endif

	return tp ? take_retransmit(sk, tp, (void *)ctx[1], err, HOOK_RAW_TP) : 0;
}

int raw_tp_tcp_retransmit_synack(u64 *ctx)
{
	return take_synack_retransmit((void *)ctx[0], (void *)ctx[1], HOOK_RAW_TP);
}
#endif

#if TRANSMIT_KPROBE
int kprobe_tcp_transmit_skb(void *ctx)
{
	struct pt_regs *regs = ctx;
	struct sock *sk = (void *)PT_REGS_PARM1(regs);

	return take_transmit(sk, (void *)sk, (void *)PT_REGS_PARM2(regs), PT_REGS_PARM5(regs), HOOK_KPROBE);
}

int kprobe_tcp_make_synack(void *ctx)
{
	struct pt_regs *regs = ctx;

	return take_synack((void *)PT_REGS_PARM1(regs), (void *)PT_REGS_PARM3(regs), HOOK_KPROBE);
}
#endif

#if RETRANSMIT_KPROBE
/*
 * The arguments of calls under way, for the return probe. By stack pointer: a softirq may interrupt a call and make another
 * on the same task. Entry inserts, return deletes; what a missed return leaves behind falls out of the LRU.
 */
struct call {
	struct sock *sk;
	void *subject; /* sk_buff or request_sock */
};
BPF_TABLE("lru_hash", u64, struct call, calls, 1024);

/* On x86 the return address is still on the stack at entry, and popped at return. */
#if defined(bpf_target_x86)
#define ENTRY_SP(regs) (PT_REGS_SP(regs) + 8)
#else
#define ENTRY_SP(regs) PT_REGS_SP(regs)
#endif

static __always_inline int remember(struct pt_regs *regs)
{
	struct call call = { (void *)PT_REGS_PARM1(regs), (void *)PT_REGS_PARM2(regs) };
	u64 sp = ENTRY_SP(regs);

	calls.update(&sp, &call);
	return 0;
}

static __always_inline bool recall(struct pt_regs *regs, struct call *call)
{
	u64 sp = PT_REGS_SP(regs);
	struct call *found = calls.lookup(&sp);

	if (!found)
		return false;
	*call = *found;
	calls.delete(&sp);
	return true;
}

int kprobe_tcp_retransmit_skb(void *ctx)
{
	return remember(ctx);
}

int kretprobe_tcp_retransmit_skb(void *ctx)
{
	struct pt_regs *regs = ctx;
	struct call call;

	if (!recall(regs, &call))
		return 0;
	return take_retransmit(call.sk, (void *)call.sk, call.subject, PT_REGS_RC(regs), HOOK_KPROBE);
}

int kprobe_tcp_rtx_synack(void *ctx)
{
	return remember(ctx);
}

int kretprobe_tcp_rtx_synack(void *ctx)
{
	struct pt_regs *regs = ctx;
	struct call call;

	if (!recall(regs, &call) || (s32)PT_REGS_RC(regs))
		return 0;
	return take_synack_retransmit(call.sk, call.subject, HOOK_KPROBE);
}
#endif

#if TRANSMIT_CGROUP_SKB
#include "wire.h"

int cgroup_skb_egress(struct __sk_buff *skb)
{
	struct flow flow = {};
	struct wire wire = {};
	struct tcp_sock *tp = NULL;
	struct transmit_event *e;

	if (!parse(skb, &flow, &wire))
		return 1;
	flow.hook = HOOK_CGROUP_SKB;
	if (skb->sk)
		tp = bpf_skc_to_tcp_sock(skb->sk);
	if (tp)
		fill_owner(&flow, (const struct sock *)tp);
	if (tp && !is_synack(&wire))
		set_cookie(&flow, bpf_get_socket_cookie(skb));
	if (!passes(&flow))
		return 1;
	e = reserve_transmit(&flow);
	if (!e)
		return 1;
	fill_from_wire(&e->s, skb, &wire);
	if (is_synack(&wire)) {
		e->s.state = TCP_SYN_RECV;
	} else if (tp) {
		fill_tcp(&e->s, tp);
		fill_is_retransmit(e, tp);
	}
	transmit_pipe.ringbuf_submit(e, SUBMIT_FLAGS);
	return 1;
}
#endif
