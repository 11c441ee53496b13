/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The cgroup hook sees a packet and not TCP's control block: headers, read from the skb. It starts at the IP header.
 */
#ifndef REBPF_WIRE_H
#define REBPF_WIRE_H

#define IPPROTO_HOPOPTS 0
#define IPPROTO_TCP 6

struct ipv4_header {
	u8 version_ihl;
	u8 tos;
	u16 total_length;
	u32 id_and_fragment;
	u8 ttl;
	u8 protocol;
	u16 checksum;
	u32 saddr;
	u32 daddr;
};

struct ipv6_header {
	u32 version_and_flow;
	u16 payload_length;
	u8 next_header;
	u8 hop_limit;
	u32 saddr[4];
	u32 daddr[4];
};

struct tcp_header {
	u16 source;
	u16 dest;
	u32 seq;
	u32 ack_seq;
	u8 data_offset;
	u8 flags;
	u16 window;
};

struct wire {
	struct tcp_header tcp;
	u32 payload_offset;
};

/* Where the TCP header is; 0 if the packet is not TCP. */
static __always_inline u32 parse_ipv4(struct __sk_buff *skb, struct flow *flow)
{
	struct ipv4_header ip;

	if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)) || ip.protocol != IPPROTO_TCP)
		return 0;
	fill_v4(flow->saddr, ip.saddr);
	fill_v4(flow->daddr, ip.daddr);
	return (ip.version_ihl & 0xf) * 4;
}

/* The one extension that the kernel puts before TCP by itself is hop-by-hop, for packets over 64 KiB (BIG TCP). */
static __always_inline u32 parse_ipv6(struct __sk_buff *skb, struct flow *flow)
{
	struct ipv6_header ip;
	u8 hop_by_hop[2];
	u32 offset = sizeof(ip);

	if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
		return 0;
	if (ip.next_header == IPPROTO_HOPOPTS) {
		if (bpf_skb_load_bytes(skb, offset, hop_by_hop, sizeof(hop_by_hop)))
			return 0;
		ip.next_header = hop_by_hop[0];
		offset += (hop_by_hop[1] + 1) * 8;
	}
	if (ip.next_header != IPPROTO_TCP)
		return 0;
	fill_v6(flow->saddr, ip.saddr);
	fill_v6(flow->daddr, ip.daddr);
	return offset;
}

static __always_inline bool parse(struct __sk_buff *skb, struct flow *flow, struct wire *wire)
{
	u8 version;
	u32 offset;

	if (bpf_skb_load_bytes(skb, 0, &version, 1))
		return false;
	offset = version >> 4 == 4 ? parse_ipv4(skb, flow) : parse_ipv6(skb, flow);
	if (!offset || bpf_skb_load_bytes(skb, offset, &wire->tcp, sizeof(wire->tcp)))
		return false;
	flow->sport = from_be16(wire->tcp.source);
	flow->dport = from_be16(wire->tcp.dest);
	wire->payload_offset = offset + (wire->tcp.data_offset >> 4) * 4;
	return true;
}

static __always_inline bool is_synack(const struct wire *wire)
{
	return (wire->tcp.flags & 0x12) == 0x12;
}

static __always_inline void fill_from_wire(struct segment *s, struct __sk_buff *skb, const struct wire *wire)
{
	u32 segs = skb->gso_segs;

	s->tcp_flags = wire->tcp.flags;
	s->seq = __builtin_bswap32(wire->tcp.seq);
	s->ack_seq = __builtin_bswap32(wire->tcp.ack_seq);
	s->payload_len = skb->len - wire->payload_offset;
	s->end_seq = s->seq + s->payload_len + !!(s->tcp_flags & TCPHDR_SYN) + !!(s->tcp_flags & TCPHDR_FIN);
	s->segs = segs ? segs : 1;
	s->ifindex = skb->ifindex;
	s->known |= KNOWN_ACK_SEQ | KNOWN_IFINDEX;
}

#endif
