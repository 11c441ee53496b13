/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The agent's own traffic never becomes events: it would feed back into itself.
 */
#ifndef REBPF_FILTER_H
#define REBPF_FILTER_H

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
