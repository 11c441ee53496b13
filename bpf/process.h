/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The process that a socket belongs to: the one that called connect() or listen(), which run in the process that calls
 * them. An accepted socket has its listener's. Never the task that happens to run when a segment is sent.
 */
#ifndef REBPF_PROCESS_H
#define REBPF_PROCESS_H

struct process {
	u32 pid; /* 0: unknown */
	u8 comm[16];
};

struct flow_state {
	u64 start_ns; /* 0: unknown, older than the programs */
	u64 established_ns;
	struct process process;
	u32 role;
	u32 retrans[8]; /* segments, by cause */
	u32 seen_retrans; /* total_retrans when the last retransmission was counted */
	u32 reported_retrans; /* total_retrans when the cgroup hook's programs reported the last retransmission */
	u32 closed; /* the closing record was taken */
	u32 unseen; /* retransmissions that no program has seen, by the last record, plus 1; 0: no record */
	u32 counted_unseen; /* those that were counted as lost */
	u32 _pad;
	u64 visit; /* the last visit of open files that came by */
};

#if HAS_TRACING_STORAGE
/* As BPF_SK_STORAGE, but an accepted socket begins with a copy of the listener's value. */
#define BPF_CLONED_SK_STORAGE(_name, _leaf_type)                                     \
	struct _name##_table_t {                                                     \
		int key;                                                             \
		_leaf_type leaf;                                                     \
		void *(*sk_storage_get)(void *, void *, int);                        \
		int (*sk_storage_delete)(void *);                                    \
		u32 flags;                                                           \
	};                                                                           \
	__attribute__((section("maps/sk_storage"))) struct _name##_table_t _name = { \
		.flags = BPF_F_NO_PREALLOC | BPF_F_CLONE,                            \
	};                                                                           \
	BPF_ANNOTATE_KV_PAIR(_name, int, _leaf_type)

/* The programs insert, when a socket connects, listens, first retransmits or closes; deleted with the socket. */
BPF_CLONED_SK_STORAGE(flow_states, struct flow_state);

static __always_inline struct flow_state *find_state(void *sk)
{
	return flow_states.sk_storage_get(sk, NULL, 0);
}

static __always_inline struct flow_state *create_state(void *sk)
{
	return flow_states.sk_storage_get(sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
}

/* Nothing to do: the kernel deletes it with the socket, and an accepted socket's is the listener's copy. */
static __always_inline void delete_state(void *sk)
{
}
#else
/*
 * By the address of the socket. The programs insert, as above, and delete when it is closed; the oldest are evicted. A
 * new socket at the same address starts empty. An accepted socket inherits nothing from its listener.
 */
BPF_TABLE("lru_hash", u64, struct flow_state, flow_states, 65536);
BPF_ARRAY(empty_state, struct flow_state, 1);

static __always_inline struct flow_state *find_state(void *sk)
{
	u64 key = (u64)sk;

	return flow_states.lookup(&key);
}

static __always_inline struct flow_state *create_state(void *sk)
{
	u64 key = (u64)sk;
	u32 zero = 0;
	struct flow_state *empty = empty_state.lookup(&zero);

	return empty ? flow_states.lookup_or_try_init(&key, empty) : NULL;
}

static __always_inline void delete_state(void *sk)
{
	u64 key = (u64)sk;

	flow_states.delete(&key);
}
#endif

#if PROBE_READ
/*
 * By cookie, for kprobe programs, which cannot use socket storage. Connect, listen and accept insert, close deletes; the
 * oldest are evicted.
 */
BPF_TABLE("lru_hash", u64, struct process, processes, 65536);
#endif

/*
 * Whether it is a further subflow of a process's Multipath TCP, which the kernel connects: in a worker, or in the process
 * that adds an endpoint (ip mptcp, mptcpd).
 */
static __always_inline bool is_further_subflow(const struct tcp_sock *tp)
{
#if HAS_tcp_sock_is_mptcp && HAS_tcp_sock_icsk_ulp_data && HAS_mptcp_subflow_context_conn && HAS_mptcp_sock_first
	const struct mptcp_subflow_context *subflow = READ(tp, icsk_ulp_data);
	const struct mptcp_sock *connection = (const void *)PROBE(subflow, conn);

	return READ(tp, is_mptcp) && (u64)PROBE(connection, first) != (u64)tp;
#else
	return false;
#endif
}

/* The process of a task, not the thread. */
static __always_inline void note_process(struct process *process, const struct task_struct *task)
{
	const struct task_struct *leader = PROBE(task, group_leader);

	process->pid = PROBE(task, tgid);
	bpf_probe_read_kernel(process->comm, sizeof(process->comm), &leader->comm);
}

static __always_inline void publish_process(struct tcp_sock *tp, const struct flow_state *state)
{
#if PROBE_READ
	u64 cookie = traced_cookie((struct sock *)tp);
	struct process process = state->process;

	if (process.pid && cookie)
		processes.update(&cookie, &process);
#endif
}

/*
 * A socket changes its state: the process is known when it connects or listens, and passes to what it accepts. An
 * accepted socket gets its cookie after its first change, to TCP_SYN_RECV.
 */
static __always_inline void follow_process(struct tcp_sock *tp, u32 old_state, u32 state)
{
	const struct task_struct *task = (const void *)bpf_get_current_task();
	bool begins = state == TCP_SYN_SENT || state == TCP_LISTEN;
	struct flow_state *found = NULL;

	if (begins)
		found = create_state(tp);
	else if (PROBE_READ && old_state == TCP_SYN_RECV && state != TCP_CLOSE)
		found = find_state(tp);
	if (found && begins) {
		found->reported_retrans = 0;
		if (!is_further_subflow(tp))
			note_process(&found->process, task);
	}
	if (found)
		publish_process(tp, found);
#if PROBE_READ
	if (state == TCP_CLOSE) {
		u64 cookie = READ_IF(sock, (const struct sock *)tp, skc_cookie);

		processes.delete(&cookie);
	}
#endif
#if !FLOW_RAW_TP /* whose last program deletes */
	if (state == TCP_CLOSE)
		delete_state(tp);
#endif
}

/* `sk` is the socket, or a SYN-ACK's listener; `cookie` is its cookie, on the stack. */
static __always_inline u32 fill_process(struct segment *s, void *sk, u64 *cookie)
{
#if PROBE_READ
	struct process *process = processes.lookup(cookie);
#else
	struct flow_state *state = find_state(sk);
	struct process *process = state && state->process.pid ? &state->process : NULL;
#endif

	if (!process)
		return 0;
	s->pid = process->pid;
	__builtin_memcpy(s->comm, process->comm, sizeof(s->comm));
	return KNOWN_PROCESS;
}

/*
 * A socket that an open file of a task belongs to: its process, if nothing is known about it. Run once, for sockets that
 * are older than the programs. A listener's role passes to the sockets that it accepts from now on.
 */
static __always_inline int adopt_socket(const struct task_struct *task, struct file *file)
{
	struct socket *socket = task && file ? bpf_sock_from_file(file) : NULL;
	struct sock *sk = socket ? socket->sk : NULL;
	struct tcp_sock *tp = sk ? bpf_skc_to_tcp_sock(sk) : NULL;
	struct flow_state *state;

	if (!tp || READ((const struct sock *)tp, skc_state) == TCP_CLOSE)
		return 0;
	state = create_state(tp);
	if (!state || state->process.pid)
		return 0;
	note_process(&state->process, task);
	publish_process(tp, state);
	if (READ((const struct sock *)tp, skc_state) == TCP_LISTEN)
		state->role = ROLE_SERVER;
	return 0;
}

#endif
