/*
 * Remembers what was encoded from the head of a row: the flow, which many rows share. The newest of the heads with the
 * same hash is remembered, so memory is bounded and nothing must be looked for.
 */
#ifndef REBPF_MEMO_H
#define REBPF_MEMO_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MEMO_HEAD 64 /* bytes of a row: struct flow in bpf/events.h */
#define MEMO_BITS 8
#define MEMO_MAX_BYTES 318 /* longer ones are not remembered */

struct memo_entry {
	uint8_t head[MEMO_HEAD];
	uint16_t length; /* 0: the entry is free */
	uint8_t data[MEMO_MAX_BYTES];
};

struct memo {
	struct memo_entry *entries; /* NULL: nothing is remembered */
};

static inline bool memo_open(struct memo *memo)
{
	memo->entries = calloc((size_t)1 << MEMO_BITS, sizeof(*memo->entries));
	return memo->entries;
}

static inline void memo_clear(struct memo *memo)
{
	for (size_t i = 0; memo->entries && i < (size_t)1 << MEMO_BITS; i++)
		memo->entries[i].length = 0;
}

/* Return the entry of a head, which may hold another one. */
static inline struct memo_entry *memo_entry(const struct memo *memo, const uint8_t *head)
{
	const uint64_t multiplier = 0x9E3779B97F4A7C15ULL;
	uint64_t words[MEMO_HEAD / sizeof(uint64_t)], hash = 0;

	memcpy(words, head, sizeof(words));
	for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++)
		hash += (words[i] ^ words[i] >> 32) * (multiplier + 2 * i);
	return &memo->entries[hash * multiplier >> (64 - MEMO_BITS)];
}

static inline bool memo_has(const struct memo_entry *entry, const uint8_t *head)
{
	return entry->length && !memcmp(entry->head, head, MEMO_HEAD);
}

static inline void memo_put(struct memo_entry *entry, const uint8_t *head, const uint8_t *data, size_t length)
{
	if (length > MEMO_MAX_BYTES)
		return;
	memcpy(entry->head, head, MEMO_HEAD);
	memcpy(entry->data, data, length);
	entry->length = (uint16_t)length;
}

#endif
