/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Which flows become events: those with a wanted address and a wanted port on either side, and never the agent's own.
 * The first question needs the endpoints alone, and is asked before the rest of a flow is looked up.
 */
#ifndef REBPF_FILTER_H
#define REBPF_FILTER_H

static __always_inline bool is_wanted_address(const u8 *bytes)
{
	struct address key;

	__builtin_memcpy(key.bytes, bytes, sizeof(key.bytes));
	return addresses.lookup(&key) != NULL;
}

static __always_inline bool is_wanted_port(u16 port)
{
	return ports.lookup(&port) != NULL;
}

static __always_inline bool is_wanted(const struct flow *flow)
{
#if FILTER_PORTS
	if (!is_wanted_port(flow->sport) && !is_wanted_port(flow->dport))
		return false;
#endif
#if FILTER_ADDRESSES
	if (!is_wanted_address(flow->saddr) && !is_wanted_address(flow->daddr))
		return false;
#endif
	return true;
}

/* Needs the cookie, and for listeners the network namespace. */
static __always_inline bool is_own(const struct flow *flow)
{
	u64 cookie = flow->sk_cookie;

	if (cookie && own_sockets.lookup(&cookie))
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
