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
};

/* Bits of segment.known: which of the fields that a hook may not provide are filled. Unknown fields are 0. */
#define KNOWN_SK_COOKIE (1u << 0)
#define KNOWN_CGROUP_ID (1u << 1)
#define KNOWN_UID (1u << 2)
#define KNOWN_ACK_SEQ (1u << 3)
#define KNOWN_CA_STATE (1u << 4)
#define KNOWN_TCP (1u << 5) /* srtt_us to mss */
#define KNOWN_IFINDEX (1u << 6)
#define KNOWN_IS_RETRANSMIT (1u << 7)
#define KNOWN_RETRANSMIT_NO (1u << 8)

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

/* Per CPU and stream. */
struct counters {
	u64 begin; /* the number before the first event's, which the agent sets, so that no number is used twice */
	u64 lost_ring_full;
	u64 seq; /* the last cpu_seq; the agent sets it to `begin`. The difference is the events that passed the filter */
	u64 forgotten; /* returns of calls whose entry is missing from its map: each may be a lost event */
};

#endif
