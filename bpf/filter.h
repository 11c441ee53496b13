/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Which flows become events: never the agent's own, and those with a wanted address and a wanted port on either side.
 */
#ifndef REBPF_FILTER_H
#define REBPF_FILTER_H

static __always_inline bool is_own(const struct flow *flow)
{
	u64 cookie = flow->sk_cookie;
	struct endpoint local = { .netns = flow->netns, .port = flow->sport };

	if (own_sockets.lookup(&cookie))
		return true;
#if FILTER_OWN_LISTENERS
	__builtin_memcpy(local.address, flow->saddr, sizeof(local.address));
	return own_listeners.lookup(&local) != NULL;
#else
	return false;
#endif
}

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

static __always_inline bool passes(const struct flow *flow)
{
#if FILTER_ADDRESSES
	if (!is_wanted_address(flow->saddr) && !is_wanted_address(flow->daddr))
		return false;
#endif
#if FILTER_PORTS
	if (!is_wanted_port(flow->sport) && !is_wanted_port(flow->dport))
		return false;
#endif
	return !is_own(flow);
}

#endif
