/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The agent's own traffic never becomes events, because it would feed back into itself.
 *
 * It is recognized by socket cookie, which is unique until the next boot: the cookies of the agent's sockets, which the
 * agent enters before they connect; of the other end of such a connection, if in the same network namespace; and of the
 * sockets that the agent's listeners accept.
 *
 * The other end has no socket yet when it answers a SYN, so until then it is recognized by its endpoints. Such an entry is
 * created when the agent's socket sends or is connected, and removed when that socket closes. No other socket can have
 * these endpoints meanwhile, and a later connection between them removes leftover entries. Any process can dissolve a
 * connection and use its socket, and so its cookie, for another one: this ends what was known about the socket.
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

/* 0: does not belong to the agent. */
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

/* A socket that connects or listens again, with the same cookie, is no longer the other end. */
static __always_inline void forget_partner(u64 cookie)
{
	if (whose(cookie) == OWN_PARTNER)
		own_sockets.delete(&cookie);
}

/* Closed sockets are not noted: they may still send a reset. */
static __always_inline void note_peer(const struct flow *flow, u32 state)
{
	struct connection peer = peer_of(flow);
	u8 yes = 1;

	if (state != TCP_CLOSE && !own_peers.lookup(&peer))
		own_peers.update(&peer, &yes);
}

/* Another process opens a connection: entries for its endpoints are out of date. */
static __always_inline void forget_peers(const struct flow *flow)
{
	struct connection sender = sent_by(flow), peer = peer_of(flow);

	own_peers.delete(&sender);
	own_peers.delete(&peer);
}

/*
 * OWN_OPENED or OWN_PARTNER for a socket of the agent's traffic; 0 for all others. The flow has endpoints and network
 * namespace. `cookie` is that of the socket, of a SYN-ACK's listener, or 0. `state` is that of the socket, or 0 without a
 * socket.
 */
static __always_inline u8 own_side(const struct flow *flow, u64 cookie, u32 state)
{
	struct connection sender = sent_by(flow);
	u8 owner = whose(cookie);

	if (owner == OWN_OPENED)
		note_peer(flow, state);
	if (owner)
		return owner;
	if (state == TCP_SYN_SENT) {
		forget_peers(flow);
		return 0;
	}
	if (!own_peers.lookup(&sender))
		return 0;
	if (state && state != TCP_LISTEN)
		add_partner(cookie);
	return OWN_PARTNER;
}

static __always_inline struct endpoint local_end(const struct flow *flow)
{
	struct endpoint local = { .netns = flow->netns, .port = flow->sport };

	__builtin_memcpy(local.address, flow->saddr, sizeof(local.address));
	return local;
}

/* An accepted socket: adds it if it is the other end of the agent's connection, or accepted by the agent's listener. */
static __always_inline void note_accepted(const struct flow *flow, struct sock *sk)
{
	struct connection sender = sent_by(flow);
	struct endpoint local = local_end(flow);

	if (own_peers.lookup(&sender) || own_listeners.lookup(&local))
		add_partner(traced_cookie(sk));
}

/* After a socket of the agent closes, others can use its endpoints. Its cookie stays, because it may still send a reset. */
static __always_inline void forget_closed(const struct flow *flow, u32 old_state)
{
	struct connection peer = peer_of(flow);
	struct endpoint local = local_end(flow);

	if (old_state == TCP_LISTEN)
		own_listeners.delete(&local);
	else
		own_peers.delete(&peer);
}

#endif
