/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Finds the rule that decides a segment. producer/rules/tables.py builds the tables and documents them.
 *
 * There are two generations of the tables. The agent fills the inactive one and then writes rules_active, one 64-bit word.
 * A program reads it once, so that a segment is decided entirely by the old rules or entirely by the new ones.
 *
 * A decision is stored with its socket, with everything about the socket that does not change, and holds until the rules
 * change. So most segments cost one lookup.
 */
#ifndef REBPF_RULES_H
#define REBPF_RULES_H

#define RULES 1024
#define RULE_WORDS (RULES / 64)
#define CLASSES 2048
#define PORT_GROUP 4
#define GENERATIONS 2
#define CGROUP_LEVELS 32

enum property {
	PROPERTY_NETNS = 0,
	PROPERTY_CGROUP = 1,
	PROPERTY_UID = 2,
	PROPERTY_INTERFACE = 3,
	PROPERTY_STATE = 4,
	PROPERTIES = 5,
};

struct rule_set {
	u64 bits[RULE_WORDS];
};

struct rule_sides {
	struct rule_set local, remote, either;
};

struct rule_action {
	u32 sample_rate;
	u8 keep[2]; /* by stream */
	u8 sampled[2];
	u8 by_event;
	u8 keep_flow;
	u8 _pad[2];
};

struct prefix_key {
	u32 length; /* of generation and address, in bits */
	u32 generation;
	u8 address[16];
};

struct value_key {
	u32 generation;
	u32 property;
	u64 value;
};

struct port_group {
	u16 classes[PORT_GROUP];
};

struct rule_generation {
	u32 rules; /* 0: the default decides at once */
	u32 by_segment; /* a rule uses the interface or the state, which change from segment to segment */
	u32 unnamed[PROPERTIES]; /* the set of values that no rule names */
	u32 prefixes; /* the generation of rule_prefixes; both generations may share one */
};

/* The rules' decision on a segment. The arrays are by stream. */
struct choice {
	u64 active; /* rules_active at the time */
	u32 rates[STREAMS]; /* the number of events that one represents; 0: no event */
	u32 flow_hash; /* for the budget */
	u8 by_event[STREAMS]; /* draw for each event whether it is one of `rates` */
	u8 by_segment; /* holds only for one interface and state */
	u8 _pad;
};

/* The decision on a socket, and its owner. Not for listeners: they answer for connections that differ. */
struct verdict {
	struct choice choice;
	u32 interface;
	u32 state;
	struct owner owner;
};

/* The agent inserts into the inactive generation, and deletes what it inserted there two reloads ago. */
BPF_ARRAY(rules_active, u64, 1); /* version << 1 | generation; 0: capture nothing */
BPF_ARRAY(rule_generations, struct rule_generation, GENERATIONS);
BPF_ARRAY(rule_actions, struct rule_action, GENERATIONS *(RULES + 1));
BPF_LPM_TRIE(rule_prefixes, struct prefix_key, u32, 262144);
BPF_ARRAY(rule_addresses, struct rule_sides, GENERATIONS *CLASSES);
BPF_ARRAY(rule_port_classes, struct port_group, GENERATIONS * 65536 / PORT_GROUP);
BPF_ARRAY(rule_ports, struct rule_sides, GENERATIONS *CLASSES);
BPF_HASH(rule_values, struct value_key, u32, 16384);
BPF_ARRAY(rule_sets, struct rule_set, GENERATIONS *CLASSES);
/* kprobe programs cannot use socket storage, and on Linux before 5.11 no tracing program can. */
#define VERDICTS_BY_COOKIE (PROBE_READ || !HAS_TRACING_STORAGE)
#if VERDICTS_BY_COOKIE
/* The programs insert; the oldest are evicted. */
BPF_TABLE("lru_hash", u64, struct verdict, verdicts, 32768);
/* Zero: the value of a new entry, for which the stack has no room. */
BPF_ARRAY(empty_verdict, struct verdict, 1);
#else
/* The programs insert; deleted with the socket. */
BPF_SK_STORAGE(socket_verdicts, struct verdict);
#endif

static __always_inline u32 lowest_bit(u64 word)
{
	u32 bit = 0;

#pragma unroll
	for (u32 half = 32; half; half /= 2) {
		if (!(word & ((1ULL << half) - 1))) {
			word >>= half;
			bit += half;
		}
	}
	return bit;
}

static __always_inline struct rule_sides *sides_of_address(const struct rule_generation *tables, u32 generation,
							   const u8 *address)
{
	struct prefix_key key = { .length = 32 + 128, .generation = tables->prefixes };
	u32 index = generation * CLASSES, *number;

	__builtin_memcpy(key.address, address, sizeof(key.address));
	number = rule_prefixes.lookup(&key);
	if (number)
		index += *number;
	return rule_addresses.lookup(&index);
}

static __always_inline struct rule_sides *sides_of_port(u32 generation, u16 port)
{
	u32 group = (generation * 65536 + port) / PORT_GROUP, index;
	struct port_group *classes = rule_port_classes.lookup(&group);

	if (!classes)
		return NULL;
	index = generation * CLASSES + classes->classes[port % PORT_GROUP];
	return rule_ports.lookup(&index);
}

static __always_inline u32 set_number(u32 generation, u32 property, u64 value, u32 unnamed)
{
	struct value_key key = { .generation = generation, .property = property, .value = value };
	u32 *number = rule_values.lookup(&key);

	return number ? *number : unnamed;
}

static __always_inline struct rule_set *set_of(const struct rule_generation *tables, u32 generation, u32 property,
					       u64 value)
{
	u32 index = generation * CLASSES;

	index += set_number(generation, property, value, tables->unnamed[property]);
	return rule_sets.lookup(&index);
}

#define HAS_CGROUP_LEVELS (HAS_OWNER_CGROUP && HAS_cgroup_level && (HAS_cgroup_ancestors || HAS_cgroup_ancestor_ids))

#if HAS_CGROUP_LEVELS
/* The id of a cgroup's ancestor at a level up to its own. Since Linux 6.1 the kernel stores pointers, before that ids. */
static __always_inline u64 ancestor_at(const struct cgroup *cgroup, u32 level)
{
	u64 entry = 0;
#if HAS_cgroup_ancestors
	const struct cgroup *ancestor;

	bpf_probe_read_kernel(&entry, sizeof(entry), &cgroup->ancestors + level);
	ancestor = (const struct cgroup *)entry;
	return PROBE(PROBE(ancestor, kn), id);
#else
	bpf_probe_read_kernel(&entry, sizeof(entry), &cgroup->ancestor_ids + level);
	return entry;
#endif
}
#endif

/*
 * The set of the nearest named cgroup, from the root down to the socket's own; it includes the sets of named ancestors.
 * Rules can only name cgroups in the first CGROUP_LEVELS levels, so only these are searched, however deep the socket's own
 * is. The search does not end early: each end would be a path on which the verifier follows the rest of the program.
 */
static __always_inline struct rule_set *set_of_cgroup(const struct rule_generation *tables, u32 generation,
						      const struct sock *sk)
{
	u32 index = generation * CLASSES, unnamed = tables->unnamed[PROPERTY_CGROUP], number = unnamed;

#if HAS_CGROUP_LEVELS
	const struct cgroup *cgroup = sk ? cgroup_of(sk) : NULL;
	s32 own = cgroup ? PROBE(cgroup, level) : -1;

	for (s32 level = 0; level < CGROUP_LEVELS; level++) {
		if (level <= own)
			number = set_number(generation, PROPERTY_CGROUP, ancestor_at(cgroup, level), number);
	}
#endif
	index += number;
	return rule_sets.lookup(&index);
}

static __always_inline u64 uid_of(const struct sock *sk)
{
	return sk ? READ_IF(sock, sk, sk_uid) : ~0ULL;
}

/* Without a socket (NULL) there is no owner, so no cgroup or uid that a rule could name. */
static __always_inline u32 first_rule(const struct flow *flow, const struct sock *sk,
				      const struct rule_generation *tables, u32 generation, u32 interface, u32 state)
{
	struct rule_sides *saddr = sides_of_address(tables, generation, flow->saddr);
	struct rule_sides *daddr = sides_of_address(tables, generation, flow->daddr);
	struct rule_sides *sport = sides_of_port(generation, flow->sport);
	struct rule_sides *dport = sides_of_port(generation, flow->dport);
	struct rule_set *netns = set_of(tables, generation, PROPERTY_NETNS, flow->netns);
	struct rule_set *cgroup = set_of_cgroup(tables, generation, sk);
	struct rule_set *uid = set_of(tables, generation, PROPERTY_UID, uid_of(sk));
	struct rule_set *device = set_of(tables, generation, PROPERTY_INTERFACE, interface);
	struct rule_set *states = set_of(tables, generation, PROPERTY_STATE, state);

	if (!saddr || !daddr || !sport || !dport || !netns || !cgroup || !uid || !device || !states)
		return RULES;
	for (int i = 0; i < RULE_WORDS; i++) {
		u64 met = saddr->local.bits[i] & daddr->remote.bits[i];

		met &= saddr->either.bits[i] | daddr->either.bits[i];
		met &= sport->local.bits[i] & dport->remote.bits[i];
		met &= sport->either.bits[i] | dport->either.bits[i];
		met &= netns->bits[i] & cgroup->bits[i] & uid->bits[i] & device->bits[i] & states->bits[i];
		if (met)
			return i * 64 + lowest_bit(met);
	}
	return RULES;
}

static __always_inline u64 mixed(u64 hash, u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
	return hash ^ hash >> 29;
}

/* The same for all segments of a connection, in both streams. */
static __always_inline u64 hash_of(const struct flow *flow)
{
	const u64 *addresses = (const u64 *)flow->saddr; /* saddr, daddr */
	u64 hash = mixed((u64)flow->sport << 16 | flow->dport, addresses[0]);

	return mixed(mixed(mixed(hash, addresses[1]), addresses[2]), addresses[3]);
}

static __always_inline void apply(struct choice *choice, const struct rule_action *action, const struct flow *flow)
{
	u64 hash = hash_of(flow), draw = hash >> 20;

	choice->flow_hash = hash;
#pragma unroll
	for (int stream = 0; stream < STREAMS; stream++) {
		u32 rate = action->sampled[stream] ? action->sample_rate : 1;

		if (!action->keep[stream])
			rate = 0;
		else if (rate < 1)
			rate = 1;
		choice->by_event[stream] = rate > 1 && action->by_event;
		if (rate > 1 && !action->by_event && draw % rate)
			rate = 0;
		choice->rates[stream] = rate;
	}
}

/* The rules that apply now; 0: capture nothing. */
static __always_inline u64 active_rules(void)
{
	u32 zero = 0;
	u64 *active = rules_active.lookup(&zero);

	return active ? *(volatile u64 *)active : 0;
}

/* Whether a rule uses what may differ between the segments of a connection. */
static __always_inline bool decides_by_segment(void)
{
	u32 generation = active_rules() & 1;
	struct rule_generation *tables = rule_generations.lookup(&generation);

	return tables && tables->rules && tables->by_segment;
}

/*
 * Decides by the rules of `active`. `interface` is 0 if the hook does not know it. The flow has endpoints and netns. Without
 * a socket, `sk` is NULL.
 */
static __always_inline void decide(struct choice *choice, const struct flow *flow, const struct sock *sk, u32 interface,
				   u32 state)
{
	u32 generation = choice->active & 1, rule = RULES;
	struct rule_generation *tables = rule_generations.lookup(&generation);
	struct rule_action *action;

	if (!choice->active || !tables)
		return;
	if (tables->rules) {
		choice->by_segment = tables->by_segment;
		rule = first_rule(flow, sk, tables, generation, interface, state);
	}
	rule += generation * (RULES + 1);
	action = rule_actions.lookup(&rule);
	if (action)
		apply(choice, action, flow);
}

/*
 * Whether a connection has records; these are never sampled. Asked once for each record, so it is not stored with the
 * socket.
 */
static __always_inline bool keeps_flow(u64 active, const struct flow *flow, const struct sock *sk, u32 state)
{
	u32 generation = active & 1, rule = RULES;
	struct rule_generation *tables = rule_generations.lookup(&generation);
	struct rule_action *action;

	if (!active || !tables)
		return false;
	if (tables->rules)
		rule = first_rule(flow, sk, tables, generation, 0, state);
	rule += generation * (RULES + 1);
	action = rule_actions.lookup(&rule);
	return action && action->keep_flow;
}

static __always_inline struct verdict *find_verdict(void *sk, u64 cookie)
{
#if VERDICTS_BY_COOKIE
	return cookie ? verdicts.lookup(&cookie) : NULL;
#else
	return socket_verdicts.sk_storage_get(sk, NULL, 0);
#endif
}

/* NULL if there is no memory, or no cookie for the key. */
static __always_inline struct verdict *create_verdict(void *sk, u64 cookie)
{
#if VERDICTS_BY_COOKIE
	u32 zero = 0;
	struct verdict *empty = cookie ? empty_verdict.lookup(&zero) : NULL;

	if (!empty)
		return NULL;
	verdicts.update(&cookie, empty);
	return verdicts.lookup(&cookie);
#else
	return socket_verdicts.sk_storage_get(sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
#endif
}

/* A netfilter queue may return a packet to IP on another CPU meanwhile, so `active` is 0 while the verdict changes. */
static __always_inline void store_verdict(void *sk, u64 cookie, const struct choice *choice, const struct flow *flow,
					  u32 interface, u32 state)
{
	struct verdict *verdict = create_verdict(sk, cookie);

	if (!verdict)
		return;
	*(volatile u64 *)&verdict->choice.active = 0;
	verdict->choice.by_event[0] = choice->by_event[0];
	verdict->choice.by_event[1] = choice->by_event[1];
	verdict->choice.by_segment = choice->by_segment;
	verdict->choice.flow_hash = choice->flow_hash;
	verdict->choice.rates[0] = choice->rates[0];
	verdict->choice.rates[1] = choice->rates[1];
	verdict->interface = interface;
	verdict->state = state;
	get_owner(&verdict->owner, flow);
	*(volatile u64 *)&verdict->choice.active = choice->active;
}

/* A socket that connects again has other endpoints. */
static __always_inline void forget_verdict(void *sk, u64 cookie)
{
#if VERDICTS_BY_COOKIE
	verdicts.delete(&cookie);
#else
	socket_verdicts.sk_storage_delete(sk);
#endif
}

static __always_inline bool holds(const struct verdict *verdict, u64 active, u32 interface, u32 state)
{
	return verdict && active && verdict->choice.active == active &&
	       (!verdict->choice.by_segment || (verdict->interface == interface && verdict->state == state));
}

#endif
