/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The maps, but for those of the rules (rules.h).
 */
#ifndef REBPF_MAPS_H
#define REBPF_MAPS_H

#define STREAM_TRANSMIT 0
#define STREAM_RETRANSMIT 1

/*
 * The programs reserve and submit; the agent reads and moves the consumer position. The loader makes them as large as
 * the settings say; this is the least that each kernel takes, a page of 64 KiB.
 */
BPF_RINGBUF_OUTPUT(transmit_pipe, 16);
BPF_RINGBUF_OUTPUT(retransmit_pipe, 16);

/* By stream. The agent writes before the programs are attached; they add, and the agent reads. */
BPF_PERCPU_ARRAY(counters, struct counters, 2);

/*
 * The agent's own traffic: cookies of the sockets that it opens, inserted before they connect (the oldest fall out),
 * and local endpoints of what it listens on, for sockets that the kernel makes for it. Nobody deletes.
 */
struct endpoint {
	u8 address[16];
	u32 netns;
	u32 port;
};
BPF_TABLE("lru_hash", u64, u8, own_sockets, 4096);
BPF_HASH(own_listeners, struct endpoint, u8, 64);

/*
 * The other end of the agent's connections, where that is on this host too: its side first. The programs insert it when
 * the agent's end sends, which it does before the other can; the oldest fall out.
 */
struct connection {
	u8 saddr[16];
	u8 daddr[16];
	u16 sport;
	u16 dport;
};
BPF_TABLE("lru_hash", struct connection, u8, own_peers, 4096);

#endif
