/* What connections did from one of their records to the next. No Python. */
#ifndef REBPF_CONNECTIONS_H
#define REBPF_CONNECTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Words of an entry, a record and a result, before their counters. */
enum {
	ENTRY_KEY,
	ENTRY_LAST_NS,
	ENTRY_STATE,
	ENTRY_WORDS
};
enum {
	RECORD_KEY,
	RECORD_TS_NS,
	RECORD_START_NS,
	RECORD_FLAGS,
	RECORD_WORDS
};
enum {
	RESULT_SLOT,
	RESULT_FLAGS,
	RESULT_ELAPSED_NS,
	RESULT_WORDS
};

/* Flags of a record, and the states of an entry. */
#define CONNECTION_CLOSES 1 /* the connection's last record; of an entry: it had one */
#define CONNECTION_COUNTS 2 /* the record has counters; of an entry: it had some */

/* Flags of a result. */
#define CONNECTION_FRESH 1 /* later than the connection's records before */
#define CONNECTION_OPENED 2 /* the first counters of a connection that began after the floor */
#define CONNECTION_CLOSED 4 /* the connection's first closing record */

#define CONNECTION_MOST_COUNTERS 32

/* Kinds of counters. */
enum {
	COUNTER_NARROW, /* has 32 bits, and wraps */
	COUNTER_WIDE, /* has 64 bits */
	COUNTER_RESTARTS, /* has 32 bits, and begins again at 0 when other programs count it */
};

/*
 * Connections by key. The caller allocates `slots`, a power of two of them and at least twice `most`, and `entries`;
 * both may move between calls. `seed` is secret, so that no writer can make keys collide.
 */
struct connections {
	uint64_t *slots; /* the upper half of an entry's hash, and its number plus 1 */
	uint32_t mask;
	int64_t *entries; /* ENTRY_WORDS and the counters of each */
	size_t count;
	size_t most;
	const uint8_t *kinds; /* of each counter */
	size_t counters;
	int64_t floor_ns; /* all records of connections that began later are known */
	uint64_t seed;
};

/* Fill the slots, which are all zero, from the entries. */
void connections_index(struct connections *table);

/*
 * Take records, RECORD_WORDS and counters each, and set a result of RESULT_WORDS and as many counters for each: the slot
 * is -1 if there is no room. New connections are appended to the entries.
 */
void connections_add(struct connections *table, const int64_t *records, size_t count, int64_t *results);

#endif
