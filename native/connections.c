#include "connections.h"
#include "hash.h"

#include <string.h>

static size_t entry_words(const struct connections *table)
{
	return ENTRY_WORDS + table->counters;
}

static uint64_t hash(const struct connections *table, int64_t key)
{
	return hash_word(~table->seed, (uint64_t)key, table->seed);
}

/* What the slot of an entry holds: the upper half of its hash, so that few other entries are looked at; and its number. */
static uint64_t slot_of(uint64_t hash, size_t number)
{
	return (hash & ~(uint64_t)UINT32_MAX) | (number + 1);
}

static int64_t *entry_at(const struct connections *table, uint64_t slot)
{
	return table->entries + ((uint32_t)slot - 1) * entry_words(table);
}

/* Return the slot of a key: that of its entry, or the free one that it would take. */
static uint64_t *probe(const struct connections *table, int64_t key, uint64_t hash)
{
	uint32_t at = (uint32_t)hash & table->mask;

	while (table->slots[at] &&
	       (table->slots[at] >> 32 != hash >> 32 || entry_at(table, table->slots[at])[ENTRY_KEY] != key))
		at = (at + 1) & table->mask;
	return &table->slots[at];
}

void connections_index(struct connections *table)
{
	for (size_t i = 0; i < table->count; i++) {
		int64_t key = table->entries[i * entry_words(table) + ENTRY_KEY];
		uint64_t hashed = hash(table, key);

		*probe(table, key, hashed) = slot_of(hashed, i);
	}
}

/* Return a key's entry, a new one if there is room, otherwise NULL. */
static int64_t *find(struct connections *table, int64_t key)
{
	uint64_t hashed = hash(table, key), *slot = probe(table, key, hashed);
	int64_t *entry;

	if (*slot)
		return entry_at(table, *slot);
	if (table->count == table->most)
		return NULL;
	*slot = slot_of(hashed, table->count++);
	entry = entry_at(table, *slot);
	memset(entry, 0, entry_words(table) * sizeof(*entry));
	entry[ENTRY_KEY] = key;
	return entry;
}

/* The difference of numbers that a writer chooses: it may overflow. */
static int64_t difference(int64_t left, int64_t right)
{
	return (int64_t)((uint64_t)left - (uint64_t)right);
}

static int64_t growth(const struct connections *table, size_t i, int64_t now, int64_t before)
{
	int64_t more = difference(now, before);

	return table->kinds[i] == COUNTER_WIDE ? more : (int32_t)(uint32_t)more;
}

static bool decreased(const struct connections *table, const int64_t *now, const int64_t *before)
{
	for (size_t i = 0; i < table->counters; i++)
		if (growth(table, i, now[i], before[i]) < 0)
			return true;
	return false;
}

/*
 * Whether a record is of another connection than the entry: a socket can connect again, and where the socket is unknown,
 * another one can have the same ports. A clock that was set also moves the start, but no counter back.
 */
static bool restarts(const struct connections *table, const int64_t *entry, const int64_t *record)
{
	bool was_closed = entry[ENTRY_STATE] & CONNECTION_CLOSES;
	int64_t last_ns = entry[ENTRY_LAST_NS], start_ns = record[RECORD_START_NS];

	if (record[RECORD_TS_NS] <= last_ns || (start_ns > 0 ? start_ns <= last_ns : !was_closed))
		return false;
	if (start_ns > 0 && was_closed)
		return true;
	return decreased(table, record + RECORD_WORDS, entry + ENTRY_WORDS);
}

static void count_from_beginning(const struct connections *table, const int64_t *record, int64_t *result)
{
	result[RESULT_FLAGS] |= CONNECTION_OPENED;
	if (record[RECORD_START_NS] > 0)
		result[RESULT_ELAPSED_NS] = difference(record[RECORD_TS_NS], record[RECORD_START_NS]);
	for (size_t i = 0; i < table->counters; i++) {
		int64_t all = record[RECORD_WORDS + i];

		result[RESULT_WORDS + i] = table->kinds[i] == COUNTER_WIDE ? all : (uint32_t)all;
	}
}

static void count(const struct connections *table, int64_t *entry, const int64_t *record, bool began, int64_t *result)
{
	const int64_t *now = record + RECORD_WORDS;
	int64_t *before = entry + ENTRY_WORDS;
	bool fresh = record[RECORD_TS_NS] > entry[ENTRY_LAST_NS];

	if (!(entry[ENTRY_STATE] & CONNECTION_COUNTS)) {
		if (began)
			count_from_beginning(table, record, result);
		memcpy(before, now, table->counters * sizeof(*now));
	} else {
		result[RESULT_ELAPSED_NS] = difference(record[RECORD_TS_NS], entry[ENTRY_LAST_NS]);
		for (size_t i = 0; i < table->counters; i++) {
			int64_t more = growth(table, i, now[i], before[i]);
			bool restarted = more < 0 && fresh && table->kinds[i] == COUNTER_RESTARTS;

			if (restarted)
				more = (uint32_t)now[i];
			if (more > 0 || restarted) {
				result[RESULT_WORDS + i] = more;
				before[i] = now[i];
			}
		}
	}
	if (fresh)
		entry[ENTRY_LAST_NS] = record[RECORD_TS_NS];
	entry[ENTRY_STATE] |= CONNECTION_COUNTS;
}

static void add(struct connections *table, const int64_t *record, int64_t *result)
{
	bool began = record[RECORD_START_NS] > 0 && record[RECORD_START_NS] > table->floor_ns;
	bool closes = record[RECORD_FLAGS] & CONNECTION_CLOSES, counts = record[RECORD_FLAGS] & CONNECTION_COUNTS;
	int64_t *entry = find(table, record[RECORD_KEY]);

	if (!entry) {
		result[RESULT_SLOT] = -1;
		result[RESULT_FLAGS] = CONNECTION_FRESH | (closes ? CONNECTION_CLOSED : 0);
		if (closes && counts && began)
			count_from_beginning(table, record, result);
	} else {
		size_t offset = (size_t)(entry - table->entries);

		if (counts && entry[ENTRY_STATE] & CONNECTION_COUNTS && restarts(table, entry, record))
			entry[ENTRY_STATE] = 0, began = true;
		result[RESULT_SLOT] = (int64_t)(offset / entry_words(table));
		if (record[RECORD_TS_NS] > entry[ENTRY_LAST_NS])
			result[RESULT_FLAGS] |= CONNECTION_FRESH;
		if (closes && !(entry[ENTRY_STATE] & CONNECTION_CLOSES))
			result[RESULT_FLAGS] |= CONNECTION_CLOSED;
		if (counts)
			count(table, entry, record, began, result);
		entry[ENTRY_STATE] |= closes ? CONNECTION_CLOSES : 0;
	}
	for (size_t i = RESULT_ELAPSED_NS; i < RESULT_WORDS + table->counters; i++)
		if (result[i] < 0)
			result[i] = 0;
}

void connections_add(struct connections *table, const int64_t *records, size_t count, int64_t *results)
{
	size_t record_words = RECORD_WORDS + table->counters, result_words = RESULT_WORDS + table->counters;

	memset(results, 0, count * result_words * sizeof(*results));
	for (size_t i = 0; i < count; i++)
		add(table, records + i * record_words, results + i * result_words);
}
