/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The record layouts that kernel programs and agent share.
 *
 * Members have fixed widths, there are no holes, and every byte is written. producer/events.py has the same layout as
 * numpy dtypes; at each load the compiler checks one against the other (layout_check.h is generated from the dtypes).
 *
 * Addresses are IPv6, IPv4 as v4-mapped (::ffff:a.b.c.d), in network order. Ports and all numbers are in host order.
 */
#ifndef REBPF_EVENTS_H
#define REBPF_EVENTS_H

enum hook {
	HOOK_FENTRY = 0,
	HOOK_KPROBE = 1,
	HOOK_RAW_TP = 2,
	HOOK_CGROUP_SKB = 3,
};

enum cause {
	CAUSE_OTHER = 0,
	CAUSE_RTO = 1,
	CAUSE_FAST = 2,
	CAUSE_SLOW_START = 3,
	CAUSE_TLP = 4,
	CAUSE_SYN = 5,
	CAUSE_SYN_ACK = 6,
	CAUSES = 7,
};

enum role {
	ROLE_UNKNOWN = 0,
	ROLE_CLIENT = 1,
	ROLE_SERVER = 2,
};

enum reason {
	REASON_INTERVAL = 0,
	REASON_CLOSE = 1,
};

/*
 * Bits of segment.known and flow_event.known: which of the fields that a hook may not provide are filled. Unknown fields
 * are 0.
 */
#define KNOWN_SK_COOKIE (1u << 0)
#define KNOWN_CGROUP_ID (1u << 1)
#define KNOWN_UID (1u << 2)
#define KNOWN_ACK_SEQ (1u << 3)
#define KNOWN_CA_STATE (1u << 4)
#define KNOWN_TCP (1u << 5) /* srtt_us to mss */
#define KNOWN_IFINDEX (1u << 6)
#define KNOWN_IS_RETRANSMIT (1u << 7)
#define KNOWN_RETRANSMIT_NO (1u << 8)
#define KNOWN_START_NS (1u << 9)
#define KNOWN_ROLE (1u << 10)
#define KNOWN_PROCESS (1u << 11) /* pid, comm */
#define KNOWN_ERROR (1u << 12)
#define KNOWN_CONNECT_US (1u << 13)
#define KNOWN_COUNTERS (1u << 14) /* segs_out to sndbuf_limited_us */
#define KNOWN_MIN_RTT_US (1u << 15)
#define KNOWN_DELIVERY_RATE (1u << 16)
#define KNOWN_PACING_RATE (1u << 17)
#define KNOWN_CC (1u << 18)

/* Constant for a connection: the agent encodes it once per flow. flow_known has the first three KNOWN_ bits. */
struct flow {
	u8 saddr[16];
	u8 daddr[16];
	u64 sk_cookie;
	u64 cgroup_id;
	u32 netns;
	u32 uid;
	u16 sport;
	u16 dport;
	u8 hook;
	u8 flow_known;
	u8 _pad0[2];
};

struct segment {
	struct flow flow;
	u64 ts; /* CLOCK_MONOTONIC, ns */
	u64 cpu_seq;
	u32 cpu;
	u32 known;
	u32 seq;
	u32 end_seq;
	u32 ack_seq;
	u32 payload_len;
	u32 segs;
	u32 ifindex;
	u32 sample_rate;
	u8 tcp_flags;
	u8 state;
	u8 ca_state;
	u8 _pad1;
	u32 srtt_us;
	u32 mdev_us;
	u32 rto_us;
	u32 snd_cwnd;
	u32 snd_ssthresh;
	u32 packets_out;
	u32 sacked_out;
	u32 lost_out;
	u32 retrans_out;
	u32 total_retrans;
	u32 snd_wnd;
	u32 rcv_wnd;
	u32 mss;
	u32 rules_version;
	u32 pid;
	u8 comm[16]; /* ends at the first zero */
	u32 _pad2;
};

struct transmit_event {
	struct segment s;
	u32 is_retransmit;
	u32 _pad3;
};

struct retransmit_event {
	struct segment s;
	s32 err;
	u32 retransmit_no;
	u8 cause;
	u8 _pad3[7];
};

/* What the kernel has counted for a connection since it began, and its state now. */
struct flow_event {
	struct flow flow;
	u64 ts; /* CLOCK_MONOTONIC, ns */
	u64 cpu_seq;
	u32 cpu;
	u32 known;
	u32 sample_rate;
	u32 rules_version;
	u64 start_ns; /* CLOCK_MONOTONIC */
	u64 connect_us;
	u32 pid;
	u32 error; /* positive errno */
	u8 comm[16]; /* ends at the first zero, as cc */
	u8 cc[16];
	u8 role;
	u8 reason;
	u8 state;
	u8 ca_state;
	u32 segs_out;
	u64 bytes_sent;
	u64 bytes_retrans;
	u64 bytes_acked;
	u64 bytes_received;
	u64 busy_time_us;
	u64 rwnd_limited_us;
	u64 sndbuf_limited_us;
	u32 data_segs_out;
	u32 segs_in;
	u32 data_segs_in;
	u32 total_retrans;
	u32 retrans_rto;
	u32 retrans_fast;
	u32 retrans_slow_start;
	u32 retrans_tlp;
	u32 retrans_syn;
	u32 retrans_syn_ack;
	u32 retrans_other;
	u32 delivered;
	u32 delivered_ce;
	u32 dsack_dups;
	u32 reord_seen;
	u32 rcv_ooopack;
	u32 srtt_us;
	u32 mdev_us;
	u32 rto_us;
	u32 snd_cwnd;
	u32 snd_ssthresh;
	u32 snd_wnd;
	u32 rcv_wnd;
	u32 mss;
	u32 min_rtt_us;
	u32 _pad1;
	u64 pacing_rate; /* bytes/s, as delivery_rate */
	u64 delivery_rate;
};

/* Per CPU and stream. */
struct counters {
	u64 begin; /* the number before the first event's, which the agent sets, so that no number is used twice */
	u64 lost_ring_full;
	u64 seq; /* the last cpu_seq; the agent sets it to `begin`. The difference is the events that passed the filter */
	/*
	 * Returns of calls whose entry is missing from its map: each may be a lost event. With the hook raw_tp:
	 * retransmissions that only their connections' counters show.
	 */
	u64 forgotten;
	u64 wakeup_mask; /* a number with none of these bits wakes the agent, which sets the mask */
};

#endif
