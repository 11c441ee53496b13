/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The cgroup hook sees packets, not TCP's control block: the headers are read from the skb, which starts at the IP header.
 */
#ifndef REBPF_WIRE_H
#define REBPF_WIRE_H

#define ETH_P_IP_BE 0x0008 /* 0x0800 in network order */
#define TCP_NEW_SYN_RECV 12
#define IPPROTO_HOPOPTS 0
#define IPPROTO_TCP 6
#define IPPROTO_ROUTING 43
#define IPPROTO_DSTOPTS 60
#define MAX_EXTENSIONS 4

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

struct ipv6_extension {
	u8 next_header;
	u8 length; /* in 8 bytes, the first 8 not counted */
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

/* Of the TCP header, in host order. */
struct wire {
	u32 seq;
	u32 end_seq;
	u32 ack_seq;
	u32 payload_len;
	u8 tcp_flags;
};

/* TCP builds its headers in the linear part of the packet, which is accessed directly. NULL: too short. */
static __always_inline void *header_at(struct __sk_buff *skb, u32 offset, u32 size)
{
	void *header = (void *)(long)skb->data + offset;

	return header + size > (void *)(long)skb->data_end ? NULL : header;
}

/* Returns the offset of the TCP header; 0 if the packet is not TCP. */
static __always_inline u32 parse_ipv4(struct __sk_buff *skb, struct flow *flow)
{
	struct ipv4_header *ip = header_at(skb, 0, sizeof(*ip));

	if (!ip || ip->protocol != IPPROTO_TCP)
		return 0;
	fill_v4(flow->saddr, ip->saddr);
	fill_v4(flow->daddr, ip->daddr);
	return (ip->version_ihl & 0xf) * 4;
}

/* Extension headers are rare: the kernel adds one for packets over 64 KiB (BIG TCP), and sockets can request some. */
static __always_inline u32 parse_ipv6(struct __sk_buff *skb, struct flow *flow)
{
	struct ipv6_header *ip = header_at(skb, 0, sizeof(*ip));
	struct ipv6_extension extension;
	u32 offset = sizeof(*ip);

	if (!ip)
		return 0;
	fill_v6(flow->saddr, ip->saddr);
	fill_v6(flow->daddr, ip->daddr);
	extension.next_header = ip->next_header;
#pragma unroll
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		if (extension.next_header == IPPROTO_TCP)
			return offset;
		if (extension.next_header != IPPROTO_HOPOPTS && extension.next_header != IPPROTO_ROUTING &&
		    extension.next_header != IPPROTO_DSTOPTS)
			return 0;
		if (bpf_skb_load_bytes(skb, offset, &extension, sizeof(extension)))
			return 0;
		offset += (extension.length + 1) * 8;
	}
	return extension.next_header == IPPROTO_TCP ? offset : 0;
}

static __always_inline bool parse(struct __sk_buff *skb, struct flow *flow, struct wire *wire)
{
	u32 offset = skb->protocol == ETH_P_IP_BE ? parse_ipv4(skb, flow) : parse_ipv6(skb, flow);
	struct tcp_header *tcp = offset ? header_at(skb, offset, sizeof(*tcp)) : NULL;

	if (!tcp)
		return false;
	flow->sport = from_be16(tcp->source);
	flow->dport = from_be16(tcp->dest);
	wire->payload_len = skb->len - offset - (tcp->data_offset >> 4) * 4;
	wire->tcp_flags = tcp->flags;
	wire->seq = __builtin_bswap32(tcp->seq);
	wire->end_seq = wire->seq + wire->payload_len + control_length(tcp->flags);
	wire->ack_seq = __builtin_bswap32(tcp->ack_seq);
	/* In memory, because as scalars each would take 8 bytes of the stack. */
	asm volatile("" : : "r"(wire), "r"(flow) : "memory");
	return true;
}

static __always_inline u32 fill_from_wire(struct segment *s, struct __sk_buff *skb, const struct wire *wire)
{
	u32 segs = skb->gso_segs;

	s->tcp_flags = wire->tcp_flags;
	s->seq = wire->seq;
	s->end_seq = wire->end_seq;
	s->ack_seq = wire->ack_seq;
	s->payload_len = wire->payload_len;
	s->segs = segs ? segs : 1;
	s->ifindex = skb->ifindex;
	return KNOWN_ACK_SEQ | KNOWN_IFINDEX;
}

#endif
