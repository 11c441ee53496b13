/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The maps, except those of the rules (rules.h).
 */
#ifndef REBPF_MAPS_H
#define REBPF_MAPS_H

#define STREAM_TRANSMIT 0
#define STREAM_RETRANSMIT 1
#define STREAMS 2 /* those of segments */
#define STREAM_FLOW 2

/*
 * The programs reserve and submit; the agent reads and moves the consumer position. The loader creates them with the
 * configured sizes; this one is the minimum on all kernels, a page of 64 KiB.
 */
BPF_RINGBUF_OUTPUT(transmit_pipe, 16);
BPF_RINGBUF_OUTPUT(retransmit_pipe, 16);
BPF_RINGBUF_OUTPUT(flow_pipe, 16);

/* By stream. The agent writes before the programs are attached; they add, and the agent reads. */
BPF_PERCPU_ARRAY(counters, struct counters, 3);

/*
 * The agent's own traffic (filter.h). Cookies of its sockets, which the agent inserts before they connect, and of their
 * peers, which the programs insert, and delete when these connect elsewhere. Cookies are never reused; the oldest are
 * evicted.
 */
#define OWN_OPENED 1 /* by the agent, to connect or to listen */
#define OWN_PARTNER 2 /* the other end of such a connection, or accepted by such a listener */
BPF_TABLE("lru_hash", u64, u8, own_sockets, 16384);

/* Local endpoints of the agent's listeners. The agent inserts; the listener's close deletes. */
struct endpoint {
	u8 address[16];
	u32 netns;
	u32 port;
};
BPF_HASH(own_listeners, struct endpoint, u8, 64);

/*
 * The other end of the agent's connection, its side first. The SYN of the agent's socket inserts, the socket's close
 * deletes; the oldest are evicted.
 */
struct connection {
	u8 saddr[16];
	u8 daddr[16];
	u32 netns;
	u16 sport;
	u16 dport;
};
BPF_TABLE("lru_hash", struct connection, u8, own_peers, 4096);

#endif
