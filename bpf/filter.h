/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The agent's own traffic never becomes events: it would feed back into itself.
 */
#ifndef REBPF_FILTER_H
#define REBPF_FILTER_H

/* The agent's end speaks first, so that its peer is known before it answers. */
static __always_inline void note_peer(const struct flow *flow)
{
	struct connection peer = { .sport = flow->dport, .dport = flow->sport };
	u8 yes = 1;

	__builtin_memcpy(peer.saddr, flow->daddr, sizeof(peer.saddr));
	__builtin_memcpy(peer.daddr, flow->saddr, sizeof(peer.daddr));
	if (!own_peers.lookup(&peer))
		own_peers.update(&peer, &yes);
}

static __always_inline bool is_peer(const struct flow *flow)
{
	struct connection key = { .sport = flow->sport, .dport = flow->dport };

	__builtin_memcpy(key.saddr, flow->saddr, sizeof(key.saddr));
	__builtin_memcpy(key.daddr, flow->daddr, sizeof(key.daddr));
	return own_peers.lookup(&key) != NULL;
}

/* Needs the cookie, and for listeners the network namespace. */
static __always_inline bool is_own(const struct flow *flow)
{
	u64 cookie = flow->sk_cookie;

	if (cookie && own_sockets.lookup(&cookie)) {
		note_peer(flow);
		return true;
	}
	if (is_peer(flow))
		return true;
#if FILTER_OWN_LISTENERS
	struct endpoint local = { .netns = flow->netns, .port = flow->sport };

	__builtin_memcpy(local.address, flow->saddr, sizeof(local.address));
	return own_listeners.lookup(&local) != NULL;
#else
	return false;
#endif
}

#endif
