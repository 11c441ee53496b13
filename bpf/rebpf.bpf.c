// SPDX-License-Identifier: GPL-2.0
/*
 * The programs, one per probe, with three steps each: select the flow, reserve and fill an event, submit it.
 *
 * bcc compiles this file, and each program is then loaded by name (producer/kernel/hooks.py). Only the programs of the
 * chosen hooks are compiled. Contexts are `void *` or `u64 *` because bcc rewrites accesses through a typed one.
 */
#include "kernel.h"
#include "events.h"
#include "layout_check.h"
#include "maps.h"
#include "number.h"
#include "fill.h"
#include "filter.h"
#include "rules.h"
#include "sample.h"
#include "process.h"

/*
 * Whether a submit wakes the agent. An interrupt per event would cost the traced context more than the event itself, and
 * would cause more of the runs that the kernel skips because a program would interrupt itself. So the agent reads on a
 * timer, and each CPU wakes it now and then, by the number of the event, to check how full the ring is. A retransmit also
 * wakes it when all before it was committed: that is what WAKEUP_IF_EMPTY means.
 */
#define WAKEUP_IF_EMPTY 0
#define NO_WAKEUP 1
#define FORCE_WAKEUP 2

static __always_inline u64 wakeup(u32 stream, u64 cpu_seq, u64 otherwise)
{
	struct counters *counter = counters.lookup(&stream);

	return counter && cpu_seq & counter->wakeup_mask ? otherwise : FORCE_WAKEUP;
}

static __always_inline void count_ring_full(struct counters *counter)
{
	__sync_fetch_and_add(&counter->lost_ring_full, 1);
}

static __always_inline void begin(struct segment *s, const struct flow *flow, const struct choice *choice, u32 rate,
				  u64 cpu_seq)
{
	s->flow = *flow;
	s->ts = bpf_ktime_get_ns();
	s->cpu_seq = cpu_seq;
	s->cpu = bpf_get_smp_processor_id();
	s->sample_rate = rate;
	s->rules_version = choice->active >> 1;
}

/* NULL: no event, by the rules' choice or because the ring is full, which is counted. */
static __always_inline struct transmit_event *reserve_transmit(const struct flow *flow, const struct choice *choice)
{
	int stream = STREAM_TRANSMIT;
	u32 rate = sample_rate(choice, stream);
	struct counters *counter;
	struct transmit_event *e;
	u64 seq;

	if (!rate)
		return NULL;
	counter = counters.lookup(&stream);
	if (!counter)
		return NULL;
	seq = next_seq(counter, stream);
	e = transmit_pipe.ringbuf_reserve(sizeof(*e));
	if (!e) {
		count_ring_full(counter);
		return NULL;
	}
	__builtin_memset(e, 0, sizeof(*e));
	begin(&e->s, flow, choice, rate, seq);
	return e;
}

/* NULL: no event, by the rules' choice or because the ring is full, which is counted. */
static __always_inline struct retransmit_event *reserve_retransmit(const struct flow *flow, const struct choice *choice)
{
	int stream = STREAM_RETRANSMIT;
	u32 rate = sample_rate(choice, stream);
	struct counters *counter;
	struct retransmit_event *e;
	u64 seq;

	if (!rate)
		return NULL;
	counter = counters.lookup(&stream);
	if (!counter)
		return NULL;
	seq = next_seq(counter, stream);
	e = retransmit_pipe.ringbuf_reserve(sizeof(*e));
	if (!e) {
		count_ring_full(counter);
		return NULL;
	}
	__builtin_memset(e, 0, sizeof(*e));
	begin(&e->s, flow, choice, rate, seq);
	return e;
}

/* Creates the cookie if there is none yet, where the kernel lets the hook's programs do that. */
static __always_inline u64 cookie_of(struct sock *sk, u8 hook)
{
	return hook == HOOK_KPROBE ? READ_IF(sock, sk, skc_cookie) : traced_cookie(sk);
}

/*
 * Decides on a segment by the rules of `active`. `own_state` is the state of its socket or listener, 0 without one; `state`
 * is that for the rules. A decision on the agent's own traffic is for no event. Returns whether the decision can be stored
 * with the socket: not for the agent's own sockets, because each of their segments notes its peer, not before the handshake
 * is over, because only then is it known whether the agent is at the other end, and not before a process has accepted it,
 * because only then it has its user.
 */
static __always_inline bool decide_anew(struct choice *choice, const struct flow *flow, const struct sock *sk,
					u64 cookie, u32 own_state, u32 interface, u32 state)
{
	u8 own = own_side(flow, cookie, own_state);

	if (!own)
		decide(choice, flow, sk, interface, state);
	return choice->active && own != OWN_OPENED && own_state != TCP_SYN_SENT && own_state != TCP_SYN_RECV && sk &&
	       READ(sk, sk_socket);
}

/*
 * The flow of a full socket, and the rules' decision; returns whether they keep the segment for `stream`. The port is the
 * one on the wire: skc_num is 0 in the reset of a disconnected socket.
 */
static __always_inline bool choose_socket(struct choice *choice, struct flow *flow, struct tcp_sock *tp, u32 stream,
					  u8 hook)
{
	struct sock *sk = (struct sock *)tp;
	u64 cookie = VERDICTS_BY_COOKIE ? cookie_of(sk, hook) : 0;
	struct verdict *stored = find_verdict(tp, cookie);
	u32 state = READ(sk, skc_state);
	bool held;

	choice->active = active_rules();
	held = holds(stored, choice->active, 0, state);
	if (held) {
		*choice = stored->choice;
		if (!may_take(choice, stream))
			return false;
		set_owner(flow, &stored->owner);
	}
	flow->hook = hook;
	fill_endpoints(flow, (const struct sock_common *)sk, from_be16(READ(tp, inet_sport)));
	if (!held) {
		cookie = cookie_of(sk, hook);
		fill_owner(flow, sk, cookie);
		if (decide_anew(choice, flow, sk, cookie, state, 0, state))
			store_verdict(tp, cookie, choice, flow, 0, state);
	}
	return may_take(choice, stream);
}

/* The flow of a SYN-ACK: the request's endpoints and the listener's owner. It has no full socket yet. */
static __always_inline bool choose_request(struct choice *choice, struct flow *flow, struct sock *listener,
					   struct request_sock *req, u32 stream, u8 hook)
{
	const struct sock_common *common = (const struct sock_common *)req;

	choice->active = active_rules();
	flow->hook = hook;
	fill_endpoints(flow, common, READ(common, skc_num));
	fill_owner(flow, listener, 0);
	decide_anew(choice, flow, listener, cookie_of(listener, hook), TCP_LISTEN, 0, TCP_SYN_RECV);
	return may_take(choice, stream);
}

static __always_inline int follow_state(struct tcp_sock *tp, u32 old_state, u32 state)
{
	struct sock *sk = (struct sock *)tp;
	u64 cookie = READ_IF(sock, sk, skc_cookie);
	bool accepted = old_state == TCP_SYN_RECV && state == TCP_ESTABLISHED;
	bool connected = old_state == TCP_SYN_SENT && state == TCP_ESTABLISHED && whose(cookie) == OWN_OPENED;
	bool closed = state == TCP_CLOSE && whose(cookie);
	struct flow flow = {};

	follow_process(tp, old_state, state);
	if (state == TCP_SYN_SENT || state == TCP_LISTEN) {
		forget_verdict(tp, cookie);
		forget_partner(cookie);
	}
	if (!accepted && !connected && !closed)
		return 0;
	fill_endpoints(&flow, (const struct sock_common *)sk, from_be16(READ(tp, inet_sport)));
	flow.netns = netns_of(sk);
	if (accepted)
		note_accepted(&flow, sk);
	else if (connected) /* without transmits no program has seen its SYN */
		note_peer(&flow, state);
	else
		forget_closed(&flow, old_state);
	return 0;
}

static __always_inline int take_transmit(struct tcp_sock *tp, struct sk_buff *skb, u32 rcv_nxt, u8 hook)
{
	struct flow flow = {};
	struct choice choice = {};
	struct transmit_event *e;
	u32 known;

	if (!choose_socket(&choice, &flow, tp, STREAM_TRANSMIT, hook))
		return 0;
	e = reserve_transmit(&flow, &choice);
	if (!e)
		return 0;
	known = fill_from_cb(&e->s, tp, skb, rcv_nxt);
	known |= fill_tcp(&e->s, tp);
	known |= fill_process(&e->s, tp, &flow.sk_cookie);
	e->s.known = known | fill_is_retransmit(e, tp);
	transmit_pipe.ringbuf_submit(e, wakeup(STREAM_TRANSMIT, e->s.cpu_seq, NO_WAKEUP));
	return 0;
}

static __always_inline int take_synack(struct sock *listener, struct request_sock *req, u8 hook)
{
	struct flow flow = {};
	struct choice choice = {};
	struct transmit_event *e;
	u64 cookie = cookie_of(listener, hook);
	u32 known;

	if (!choose_request(&choice, &flow, listener, req, STREAM_TRANSMIT, hook))
		return 0;
	e = reserve_transmit(&flow, &choice);
	if (!e)
		return 0;
	known = fill_from_request(&e->s, req);
	e->s.known = known | fill_process(&e->s, listener, &cookie);
	transmit_pipe.ringbuf_submit(e, wakeup(STREAM_TRANSMIT, e->s.cpu_seq, NO_WAKEUP));
	return 0;
}

static __always_inline int take_retransmit(struct tcp_sock *tp, struct sk_buff *skb, s32 err, bool is_loss_probe,
					   u8 hook)
{
	struct flow flow = {};
	struct choice choice = {};
	struct retransmit_event *e;
	u32 known;

	if (gave_up(err, tp, skb) || !choose_socket(&choice, &flow, tp, STREAM_RETRANSMIT, hook))
		return 0;
	e = reserve_retransmit(&flow, &choice);
	if (!e)
		return 0;
	known = fill_from_cb(&e->s, tp, skb, READ(tp, rcv_nxt));
	known |= fill_tcp(&e->s, tp);
	known |= fill_process(&e->s, tp, &flow.sk_cookie);
	e->s.known = known | fill_cause(e, tp, is_loss_probe);
	e->err = errno_of(err);
	retransmit_pipe.ringbuf_submit(e, wakeup(STREAM_RETRANSMIT, e->s.cpu_seq, WAKEUP_IF_EMPTY));
	return 0;
}

static __always_inline int take_synack_retransmit(struct sock *listener, struct request_sock *req, u32 behind, u8 hook)
{
	struct flow flow = {};
	struct choice choice = {};
	struct retransmit_event *e;
	u64 cookie = cookie_of(listener, hook);
	u32 known;

	if (!choose_request(&choice, &flow, listener, req, STREAM_RETRANSMIT, hook))
		return 0;
	e = reserve_retransmit(&flow, &choice);
	if (!e)
		return 0;
	known = fill_from_request(&e->s, req);
	known |= fill_process(&e->s, listener, &cookie);
	e->s.known = known | fill_synack_cause(e, synack_number(req, behind));
	retransmit_pipe.ringbuf_submit(e, wakeup(STREAM_RETRANSMIT, e->s.cpu_seq, WAKEUP_IF_EMPTY));
	return 0;
}

/*
 * A tail loss probe calls __tcp_retransmit_skb directly. All other retransmissions go through tcp_retransmit_skb, which
 * calls __tcp_retransmit_skb or has it inlined (as in Debian's 6.1). So the inner function is only used for loss probes,
 * on sockets that are in tcp_send_loss_probe now. If the compiler has split it (as in Debian's 6.12 for arm64, where loss
 * probes call a part of it), the next function inside is used, __tcp_transmit_skb. The key is the socket, which is locked
 * meanwhile. Entry inserts, return deletes.
 */
#if RETRANSMIT_FENTRY || RETRANSMIT_KPROBE
BPF_TABLE("lru_hash", u64, u8, loss_probes, 1024);

static __always_inline void count_forgotten(void)
{
	int stream = STREAM_RETRANSMIT;
	struct counters *counter = counters.lookup(&stream);

	if (counter)
		__sync_fetch_and_add(&counter->forgotten, 1);
}

static __always_inline int begin_loss_probe(u64 sk)
{
	u8 yes = 1;

	loss_probes.update(&sk, &yes);
	return 0;
}

static __always_inline int end_loss_probe(u64 sk)
{
	if (loss_probes.delete(&sk))
		count_forgotten();
	return 0;
}

static __always_inline bool is_loss_probe(u64 sk)
{
	return loss_probes.lookup(&sk) != NULL;
}

/*
 * Proves that the probes see every retransmission, however the kernel was compiled: the tracepoint inside the innermost
 * function cannot be bypassed. It inserts the socket, and the probe of the return deletes it. If it is still there at
 * the socket's next retransmission, the last one was not seen.
 */
BPF_TABLE("lru_hash", u64, u8, retransmitting, 1024);

static __always_inline void begin_retransmission(u64 sk)
{
	u8 yes = 1;

	if (retransmitting.lookup(&sk))
		count_forgotten();
	else
		retransmitting.update(&sk, &yes);
}

static __always_inline int end_retransmission(struct tcp_sock *tp, struct sk_buff *skb, s32 err, bool is_loss_probe,
					      u8 hook)
{
	u64 sk = (u64)tp;

	retransmitting.delete(&sk);
	return take_retransmit(tp, skb, err, is_loss_probe, hook);
}
#endif

/* Since Linux 6.17 the third argument is the result, and the tracepoint also fires for failures. */
#if RETRANSMIT_TRACEPOINT_HAS_ERR
#define TRACEPOINT_ERR(ctx) ((s32)(ctx)[2])
#else
#define TRACEPOINT_ERR(ctx) 0
#endif

#include "flow.h"

#if FLOW_RAW_TP
static __always_inline int flow_changes_state(u64 *ctx, bool first)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock((void *)ctx[0]);

	return tp ? follow_flow(tp, ctx[1], ctx[2], first) : 0;
}

int raw_tp_flow_state(u64 *ctx)
{
	return flow_changes_state(ctx, true);
}

int raw_tp_flow_state_again(u64 *ctx)
{
	return flow_changes_state(ctx, false);
}

/* All kernels run this after the segment was counted. */
int raw_tp_flow_retransmit(u64 *ctx)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock((void *)ctx[0]);

	return tp && !gave_up(TRACEPOINT_ERR(ctx), tp, (void *)ctx[1]) ? count_retransmission(tp, (void *)ctx[1]) : 0;
}

/* Arguments: metadata, the map, the socket, its state. */
int iter_flow_states(u64 *ctx)
{
	visit_flow((void *)ctx[2], (void *)ctx[3]);
	count_visit((void *)ctx[0]);
	return 0;
}

#if HAS_TRACING_STORAGE
/* Arguments: metadata, a task, a file descriptor, its file. */
int iter_flow_files(u64 *ctx)
{
	visit_file((void *)ctx[0], (void *)ctx[3]);
	count_visit((void *)ctx[0]);
	return 0;
}
#endif

#endif

/* Run once with every hook. Arguments: metadata, a task, a file descriptor, its file. */
int iter_task_files(u64 *ctx)
{
	return adopt_socket((void *)ctx[1], (void *)ctx[3]);
}

/* Attached with every hook: tracks the agent's own sockets and their peers, and the processes of all sockets. */
int raw_tp_inet_sock_set_state(u64 *ctx)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock((void *)ctx[0]);

	return tp ? follow_state(tp, ctx[1], ctx[2]) : 0;
}

#if TRANSMIT_FENTRY
int fentry_tcp_transmit_skb(u64 *ctx)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock((void *)ctx[0]);

	return tp ? take_transmit(tp, (void *)ctx[1], ctx[4], HOOK_FENTRY) : 0;
}

int fentry_tcp_make_synack(u64 *ctx)
{
	return take_synack((void *)ctx[0], (void *)ctx[2], HOOK_FENTRY);
}
#endif

#if RETRANSMIT_FENTRY || RETRANSMIT_KPROBE
int raw_tp_begin_retransmit(u64 *ctx)
{
	if (!TRACEPOINT_ERR(ctx))
		begin_retransmission(ctx[0]);
	return 0;
}
#endif

#if RETRANSMIT_FENTRY
int fexit_tcp_retransmit_skb(u64 *ctx)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock((void *)ctx[0]);

	return tp ? end_retransmission(tp, (void *)ctx[1], ctx[3], false, HOOK_FENTRY) : 0;
}

int fentry_tcp_send_loss_probe(u64 *ctx)
{
	return begin_loss_probe(ctx[0]);
}

int fexit_tcp_send_loss_probe(u64 *ctx)
{
	return end_loss_probe(ctx[0]);
}

int fexit_inner_retransmit_skb(u64 *ctx)
{
	struct tcp_sock *tp;

	if (!is_loss_probe(ctx[0]))
		return 0;
	tp = bpf_skc_to_tcp_sock((void *)ctx[0]);
	return tp ? end_retransmission(tp, (void *)ctx[1], ctx[3], true, HOOK_FENTRY) : 0;
}

/* Without a clone (the third argument) the packet may be freed by now; loss probes send clones. */
int fexit_inner_transmit_skb(u64 *ctx)
{
	const struct sk_buff *skb = (void *)ctx[1];
	const struct tcp_skb_cb *cb = (const void *)skb->cb;
	struct tcp_sock *tp;

	if (!(u32)ctx[2] || !is_loss_probe(ctx[0]))
		return 0;
	tp = bpf_skc_to_tcp_sock((void *)ctx[0]);
	if (!tp || !is_sent_before(tp, READ(cb, seq), READ(cb, end_seq)))
		return 0;
	return end_retransmission(tp, (void *)ctx[1], ctx[5], true, HOOK_FENTRY);
}

int fexit_tcp_rtx_synack(u64 *ctx)
{
	s32 err = ctx[2];

	return err ? 0 : take_synack_retransmit((void *)ctx[0], (void *)ctx[1], SYNACK_COUNTED_BY_CALLER, HOOK_FENTRY);
}
#endif

#if RETRANSMIT_RAW_TP
int raw_tp_tcp_retransmit_skb(u64 *ctx)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock((void *)ctx[0]);

	return tp ? take_retransmit(tp, (void *)ctx[1], TRACEPOINT_ERR(ctx), false, HOOK_RAW_TP) : 0;
}

int raw_tp_tcp_retransmit_synack(u64 *ctx)
{
	/* All kernels count after the tracepoint. */
	return take_synack_retransmit((void *)ctx[0], (void *)ctx[1], 1, HOOK_RAW_TP);
}
#endif

#if TRANSMIT_CGROUP_SKB
/*
 * Whether a segment that was sent before is a retransmission which no program has reported yet. The kernel raises
 * total_retrans, calls the hook and then the tracepoint, unless a netfilter queue returns the packet later, and it may be
 * a first transmission.
 */
static __always_inline bool is_new_retransmission(struct tcp_sock *tp, bool without_state)
{
	struct flow_state *state = HAS_tcp_sock_total_retrans ? create_state(tp) : NULL;
	u32 total = READ_IF(tcp_sock, tp, total_retrans);

	if (!state)
		return without_state;
	if (state->reported_retrans == total)
		return false;
	state->reported_retrans = total;
	return true;
}
#endif

#if RETRANSMIT_CGROUP_SKB
/*
 * The sequence number of the last SYN-ACK of which the hook could not tell whether it was sent before, and 1 << 32. The hook
 * sets it; the tracepoint, which follows in the same call if it was, clears it. No other SYN-ACK comes in between.
 */
BPF_PERCPU_ARRAY(unknown_synack, u64, 1);

static __always_inline void note_unknown_synack(u32 seq)
{
	u32 zero = 0;
	u64 *unknown = unknown_synack.lookup(&zero);

	if (unknown)
		*unknown = 1ULL << 32 | seq;
}

static __always_inline bool was_unknown_synack(u32 seq)
{
	u32 zero = 0;
	u64 *unknown = unknown_synack.lookup(&zero);

	if (!unknown || *unknown != (1ULL << 32 | seq))
		return false;
	*unknown = 0;
	return true;
}

/*
 * Retransmissions that did not come to the hook: they failed before it, in the host's firewall or routing, a netfilter queue
 * holds them, or IPsec has encrypted them. A rule for an interface cannot be asked about one that may have come.
 */
int raw_tp_other_retransmit(u64 *ctx)
{
	s32 err = TRACEPOINT_ERR(ctx);
	struct tcp_sock *tp = bpf_skc_to_tcp_sock((void *)ctx[0]);

	if (!tp || gave_up(err, tp, (void *)ctx[1]) || (!err && decides_by_segment()))
		return 0;
	return is_new_retransmission(tp, err < 0) ? take_retransmit(tp, (void *)ctx[1], err, false, HOOK_RAW_TP) : 0;
}

int raw_tp_unknown_synack(u64 *ctx)
{
	const struct tcp_request_sock *request = (void *)ctx[1];

	if (!was_unknown_synack(PROBE(request, snt_isn)))
		return 0;
	return take_synack_retransmit((void *)ctx[0], (void *)ctx[1], 1, HOOK_RAW_TP);
}
#endif

#if TRANSMIT_KPROBE
int kprobe_tcp_transmit_skb(void *ctx)
{
	struct pt_regs *regs = ctx;

	return take_transmit((void *)PT_REGS_PARM1(regs), (void *)PT_REGS_PARM2(regs), PT_REGS_PARM5(regs),
			     HOOK_KPROBE);
}

int kprobe_tcp_make_synack(void *ctx)
{
	struct pt_regs *regs = ctx;

	return take_synack((void *)PT_REGS_PARM1(regs), (void *)PT_REGS_PARM3(regs), HOOK_KPROBE);
}
#endif

#if RETRANSMIT_KPROBE
/*
 * The arguments of calls in progress, for the return probe. The key is the stack pointer: a softirq may interrupt a call
 * and make another one on the same task. Entry inserts, return deletes; entries of missed returns are evicted by the LRU.
 */
struct call {
	void *sk;
	void *subject; /* sk_buff or request_sock */
};
BPF_TABLE("lru_hash", u64, struct call, calls, 1024);

/* On x86 the return address is on the stack at entry, and popped at return. */
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

/* For functions whose entry probe remembers every call. */
static __always_inline bool recall_or_count(struct pt_regs *regs, struct call *call)
{
	if (recall(regs, call))
		return true;
	count_forgotten();
	return false;
}

int kprobe_tcp_retransmit_skb(void *ctx)
{
	return remember(ctx);
}

int kretprobe_tcp_retransmit_skb(void *ctx)
{
	struct pt_regs *regs = ctx;
	struct call call;

	if (!recall_or_count(regs, &call))
		return 0;
	return end_retransmission(call.sk, call.subject, PT_REGS_RC(regs), false, HOOK_KPROBE);
}

int kprobe_tcp_send_loss_probe(void *ctx)
{
	struct pt_regs *regs = ctx;

	remember(regs);
	return begin_loss_probe(PT_REGS_PARM1(regs));
}

int kretprobe_tcp_send_loss_probe(void *ctx)
{
	struct call call;

	return recall_or_count(ctx, &call) ? end_loss_probe((u64)call.sk) : 0;
}

int kprobe_inner_retransmit_skb(void *ctx)
{
	struct pt_regs *regs = ctx;

	return is_loss_probe(PT_REGS_PARM1(regs)) ? remember(regs) : 0;
}

/* As fexit_inner_transmit_skb. */
int kprobe_inner_transmit_skb(void *ctx)
{
	struct pt_regs *regs = ctx;
	struct tcp_sock *tp = (void *)PT_REGS_PARM1(regs);
	const struct sk_buff *skb = (void *)PT_REGS_PARM2(regs);
	const struct tcp_skb_cb *cb = (const void *)skb->cb;

	if (!(u32)PT_REGS_PARM3(regs) || !is_loss_probe((u64)tp))
		return 0;
	return is_sent_before(tp, READ(cb, seq), READ(cb, end_seq)) ? remember(regs) : 0;
}

/* Of either inner function. */
int kretprobe_inner(void *ctx)
{
	struct pt_regs *regs = ctx;
	struct call call;

	if (!recall(regs, &call))
		return 0;
	return end_retransmission(call.sk, call.subject, PT_REGS_RC(regs), true, HOOK_KPROBE);
}

int kprobe_tcp_rtx_synack(void *ctx)
{
	return remember(ctx);
}

int kretprobe_tcp_rtx_synack(void *ctx)
{
	struct pt_regs *regs = ctx;
	struct call call;

	if (!recall_or_count(regs, &call) || (s32)PT_REGS_RC(regs))
		return 0;
	return take_synack_retransmit(call.sk, call.subject, SYNACK_COUNTED_BY_CALLER, HOOK_KPROBE);
}
#endif

#if TRANSMIT_CGROUP_SKB
#include "wire.h"

/* The rules' decision on a packet, its socket, and whether it was sent before. */
struct sender {
	struct choice choice;
	struct tcp_sock *tp; /* the socket, or the listener of a SYN-ACK; NULL: none */
	bool listener;
	bool is_retransmit; /* sent before, if known */
	bool is_retransmit_known;
	u32 synack_number; /* 1-based retransmission number of a SYN-ACK; 0 if unknown */
};

/* This hook's program may take both streams. */
static __always_inline bool is_wanted(const struct choice *choice)
{
	return may_take(choice, STREAM_TRANSMIT) || (RETRANSMIT_CGROUP_SKB && may_take(choice, STREAM_RETRANSMIT));
}

static __always_inline u32 fill_packet(struct segment *s, struct __sk_buff *skb, const struct wire *wire,
				       const struct sender *sender)
{
	u64 cookie = s->flow.sk_cookie;
	u32 known = fill_from_wire(s, skb, wire);

	if (sender->listener)
		s->state = TCP_SYN_RECV;
	else if (sender->tp)
		known |= fill_tcp(s, sender->tp);
	if (sender->tp)
		known |= fill_process(s, sender->tp, &cookie);
	return known;
}

static __always_inline void transmit_packet(struct __sk_buff *skb, const struct flow *flow, const struct wire *wire,
					    const struct sender *sender)
{
	struct transmit_event *e = reserve_transmit(flow, &sender->choice);
	u32 known;

	if (!e)
		return;
	known = fill_packet(&e->s, skb, wire, sender);
	if (sender->is_retransmit_known) {
		e->is_retransmit = sender->is_retransmit;
		known |= KNOWN_IS_RETRANSMIT;
	}
	e->s.known = known;
	transmit_pipe.ringbuf_submit(e, wakeup(STREAM_TRANSMIT, e->s.cpu_seq, NO_WAKEUP));
}

#if RETRANSMIT_CGROUP_SKB
static __always_inline void retransmit_packet(struct __sk_buff *skb, const struct flow *flow, const struct wire *wire,
					      const struct sender *sender)
{
	struct retransmit_event *e = reserve_retransmit(flow, &sender->choice);
	u32 known;

	if (!e)
		return;
	known = fill_packet(&e->s, skb, wire, sender);
	if (sender->tp && !sender->listener && !sender->synack_number)
		known |= fill_cause(e, sender->tp, false);
	else
		known |= fill_synack_cause(e, sender->synack_number);
	e->s.known = known;
	retransmit_pipe.ringbuf_submit(e, wakeup(STREAM_RETRANSMIT, e->s.cpu_seq, WAKEUP_IF_EMPTY));
}
#endif

/*
 * Looks up the socket that the peer's next segment would reach, by the addresses of this SYN-ACK: the request, which is in
 * the kernel's table before its first SYN-ACK leaves, or the connection created from it. The caller releases it.
 */
static __always_inline struct bpf_sock *find_requester(struct __sk_buff *skb, const struct flow *flow)
{
	struct bpf_sock_tuple tuple = {};

	if (skb->protocol == ETH_P_IP_BE) {
		__builtin_memcpy(&tuple.ipv4.saddr, flow->daddr + 12, 4);
		__builtin_memcpy(&tuple.ipv4.daddr, flow->saddr + 12, 4);
		tuple.ipv4.sport = from_be16(flow->dport);
		tuple.ipv4.dport = from_be16(flow->sport);
		return bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	__builtin_memcpy(tuple.ipv6.saddr, flow->daddr, 16);
	__builtin_memcpy(tuple.ipv6.daddr, flow->saddr, 16);
	tuple.ipv6.sport = from_be16(flow->dport);
	tuple.ipv6.dport = from_be16(flow->sport);
	return bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
}

/*
 * A request stores the time of its first SYN-ACK in microseconds. If this is the first one, tcp_make_synack has just put
 * the same time into the packet, plus the listener's TCP_TX_DELAY.
 */
static __always_inline void compare_with_request(struct sender *sender, struct __sk_buff *skb, const struct wire *wire,
						 const struct tcp_sock *listener,
						 const struct tcp_request_sock *request)
{
#if HAS_tcp_request_sock_snt_synack
	u32 delay = 0;

	if (listener)
		delay = READ_IF(tcp_sock, listener, tcp_tx_delay);
	if (PROBE(request, snt_isn) != wire->seq || !skb->tstamp)
		return;
	sender->is_retransmit_known = true;
	sender->is_retransmit = PROBE(request, snt_synack) != skb->tstamp / 1000 - delay;
	if (sender->is_retransmit)
		sender->synack_number = synack_number((const struct request_sock *)request, 1);
#endif
}

/* Whether a SYN-ACK was sent before; unknown if the lookup finds nothing. */
static __always_inline void recognize_synack(struct sender *sender, struct __sk_buff *skb, const struct flow *flow,
					     const struct wire *wire)
{
	struct bpf_sock *found = find_requester(skb, flow);
	const struct tcp_request_sock *request = NULL;
	struct tcp_sock *tp;

	if (!found)
		return;
	/* bpf_skc_to_tcp_request_sock() refuses the requests of Multipath TCP's listeners. */
	if (found->state == TCP_NEW_SYN_RECV) {
		request = (const void *)address_of(found);
	} else {
		tp = bpf_skc_to_tcp_sock(found);
		if (tp)
			request = fast_open_request(tp);
		/* The peer has answered an earlier SYN-ACK. */
		if (tp && !request && READ((const struct sock *)tp, skc_state) != TCP_LISTEN)
			sender->is_retransmit_known = sender->is_retransmit = true;
	}
	if (request)
		compare_with_request(sender, skb, wire, sender->tp, request);
	bpf_sk_release(found);
}

/* Whether the segment of a full socket was sent before. For TCP Fast Open's SYN-ACK the request is compared. */
static __always_inline void recognize_segment(struct sender *sender, struct __sk_buff *skb, const struct wire *wire)
{
	const struct tcp_request_sock *request = NULL;

	if (wire->tcp_flags & TCPHDR_SYN)
		request = fast_open_request(sender->tp);
	if (request) {
		compare_with_request(sender, skb, wire, sender->tp, request);
		return;
	}
	sender->is_retransmit = is_retransmission(sender->tp, wire->seq, wire->end_seq, wire->tcp_flags);
	sender->is_retransmit_known = !sender->is_retransmit || is_new_retransmission(sender->tp, true);
	sender->is_retransmit &= sender->is_retransmit_known;
}

/*
 * The flow of a packet, and the rules' decision. The packet's socket is the segment's; or, for a SYN-ACK, the listener; or,
 * for segments sent without a socket (the reset of a closed port), a raw socket of the kernel, which only has the network
 * namespace. Segments that a process writes through a raw socket are ignored: they are not sent by TCP. Returns whether the
 * rules keep it.
 */
static __always_inline bool choose_packet(struct sender *sender, struct __sk_buff *skb, struct bpf_sock *full,
					  struct flow *flow, struct wire *wire)
{
	u32 interface = skb->ifindex, state = full->state, own_state = state;
	bool raw = full->type == SOCK_RAW, listener = state == TCP_LISTEN, held;
	const struct sock *sk = NULL;
	struct verdict *stored = NULL;
	u64 cookie = 0;

	sender->choice.active = active_rules();
	if (!raw && !listener)
		stored = find_verdict(full, VERDICTS_BY_COOKIE ? bpf_get_socket_cookie(skb) : 0);
	held = holds(stored, sender->choice.active, interface, state);
	if (held && !is_wanted(&stored->choice))
		return false;
	if (!parse(skb, flow, wire))
		return false;
	flow->hook = HOOK_CGROUP_SKB;
	if (raw) {
		const struct sock *raw_sk = address_of(full);

		if (is_of_process(raw_sk))
			return false;
		flow->netns = PROBE(PROBE(raw_sk, skc_net), ns_inum);
		own_state = 0;
	} else {
		sender->tp = bpf_skc_to_tcp_sock(full);
		if (!sender->tp)
			return false;
		if (held) {
			sender->choice = stored->choice;
			set_owner(flow, &stored->owner);
			return true;
		}
		sk = (const struct sock *)sender->tp;
		cookie = bpf_get_socket_cookie(skb);
		fill_owner(flow, sk, listener ? 0 : cookie);
	}
	sender->listener = listener;
	if (decide_anew(&sender->choice, flow, sk, cookie, own_state, interface, listener ? TCP_SYN_RECV : state) &&
	    !listener)
		store_verdict(full, cookie, &sender->choice, flow, interface, state);
	return is_wanted(&sender->choice);
}

static __always_inline int take_packet(struct __sk_buff *skb, struct bpf_sock *full)
{
	struct sender sender = {};
	struct flow flow = {};
	struct wire wire = {};
	u8 empty;

	if (!choose_packet(&sender, skb, full, &flow, &wire))
		return 1;
	if (sender.listener)
		recognize_synack(&sender, skb, &flow, &wire);
	else if (sender.tp)
		recognize_segment(&sender, skb, &wire);
	/* No retransmission is empty. Computed, since on each path of a branch the verifier follows the rest. */
	empty = ((u64)(wire.end_seq - wire.seq) - 1) >> 63;
	sender.is_retransmit_known |= empty;
	sender.is_retransmit &= !empty;
	transmit_packet(skb, &flow, &wire, &sender);
#if RETRANSMIT_CGROUP_SKB
	if (sender.is_retransmit)
		retransmit_packet(skb, &flow, &wire, &sender);
	else if (sender.listener && !sender.is_retransmit_known)
		note_unknown_synack(wire.seq);
#endif
	return 1;
}

/* Returning 1 lets the packet pass. */
int cgroup_skb_egress(struct __sk_buff *skb)
{
	struct bpf_sock *full = skb->sk ? bpf_sk_fullsock(skb->sk) : NULL;

	return full && full->protocol == IPPROTO_TCP ? take_packet(skb, full) : 1;
}
#endif
