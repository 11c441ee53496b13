/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The agent's own traffic never becomes events: it would feed back into itself.
 *
 * What is left out is told by the socket's cookie, which the kernel gives to one socket until the next boot: of the
 * agent's sockets, which the agent enters before they connect; of the other end of such a connection, where that is in
 * the same network namespace; and of the sockets that the agent's listeners accept.
 *
 * The other end has no socket yet when it answers a SYN: it is known by its endpoints until its socket is. Such an entry
 * is made when the agent's socket sends, and ends with that socket. No other socket can have these endpoints meanwhile,
 * and one that begins a connection between them later removes what may have been left.
 */
#ifndef REBPF_FILTER_H
#define REBPF_FILTER_H

#define TCP_ESTABLISHED 1
#define TCP_SYN_SENT 2
#define TCP_CLOSE 7

static __always_inline struct connection sent_by(const struct flow *flow)
{
	struct connection sender = { .netns = flow->netns, .sport = flow->sport, .dport = flow->dport };

	__builtin_memcpy(sender.saddr, flow->saddr, sizeof(sender.saddr));
	__builtin_memcpy(sender.daddr, flow->daddr, sizeof(sender.daddr));
	return sender;
}

static __always_inline struct connection peer_of(const struct flow *flow)
{
	struct connection peer = { .netns = flow->netns, .sport = flow->dport, .dport = flow->sport };

	__builtin_memcpy(peer.saddr, flow->daddr, sizeof(peer.saddr));
	__builtin_memcpy(peer.daddr, flow->saddr, sizeof(peer.daddr));
	return peer;
}

/* 0: not the agent's. */
static __always_inline u8 whose(u64 cookie)
{
	u8 *owner = cookie ? own_sockets.lookup(&cookie) : NULL;

	return owner ? *owner : 0;
}

static __always_inline void add_partner(u64 cookie)
{
	u8 owner = OWN_PARTNER;

	if (cookie)
		own_sockets.update(&cookie, &owner);
}

/* A socket that is closed may still send a reset. */
static __always_inline void note_peer(const struct flow *flow, u32 state)
{
	struct connection peer = peer_of(flow);
	u8 yes = 1;

	if (state != TCP_CLOSE && !own_peers.lookup(&peer))
		own_peers.update(&peer, &yes);
}

/* A connection that somebody else begins: what was known of its endpoints is out of date. */
static __always_inline void forget_peers(const struct flow *flow)
{
	struct connection sender = sent_by(flow), peer = peer_of(flow);

	own_peers.delete(&sender);
	own_peers.delete(&peer);
}

/*
 * The flow has endpoints and network namespace. `cookie` is that of the socket, of a SYN-ACK's listener, or 0; `state`
 * that of the socket, or 0 where there is none.
 */
static __always_inline bool is_own(const struct flow *flow, u64 cookie, u32 state)
{
	struct connection sender = sent_by(flow);
	u8 owner = whose(cookie);

	if (owner) {
		if (owner == OWN_OPENED)
			note_peer(flow, state);
		return true;
	}
	if (state == TCP_SYN_SENT) {
		forget_peers(flow);
		return false;
	}
	if (!own_peers.lookup(&sender))
		return false;
	if (state && state != TCP_LISTEN)
		add_partner(cookie);
	return true;
}

static __always_inline struct endpoint local_end(const struct flow *flow)
{
	struct endpoint local = { .netns = flow->netns, .port = flow->sport };

	__builtin_memcpy(local.address, flow->saddr, sizeof(local.address));
	return local;
}

/* An accepted socket: is it the other end of an own connection, or one of an own listener's? */
static __always_inline void note_accepted(const struct flow *flow, struct sock *sk)
{
	struct connection sender = sent_by(flow);
	struct endpoint local = local_end(flow);

	if (own_peers.lookup(&sender) || own_listeners.lookup(&local))
		add_partner(bpf_get_socket_cookie(sk));
}

/* Nobody can have the endpoints of an own socket but by the time it is closed. Its cookie stays: it may send a reset. */
static __always_inline void forget_closed(const struct flow *flow, u32 old_state)
{
	struct connection peer = peer_of(flow);
	struct endpoint local = local_end(flow);

	if (old_state == TCP_LISTEN)
		own_listeners.delete(&local);
	else
		own_peers.delete(&peer);
}

static __always_inline int follow_state(struct tcp_sock *tp, u32 old_state, u32 state)
{
	struct sock *sk = (struct sock *)tp;
	bool accepted = old_state == TCP_SYN_RECV && state == TCP_ESTABLISHED;
	bool closed = state == TCP_CLOSE && whose(READ_IF(sock, sk, skc_cookie));
	struct flow flow = {};

	if (!accepted && !closed)
		return 0;
	fill_endpoints(&flow, (const struct sock_common *)sk, from_be16(READ(tp, inet_sport)));
	flow.netns = netns_of(sk);
	if (accepted)
		note_accepted(&flow, sk);
	else
		forget_closed(&flow, old_state);
	return 0;
}

#endif
