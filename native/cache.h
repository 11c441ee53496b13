/* A bounded table of encoded strings by id: cgroups' names. */
#ifndef REBPF_CACHE_H
#define REBPF_CACHE_H

#include "encode.h"

struct cache_entry {
	uint64_t id;
	uint8_t *data; /* NULL: the slot is free */
	uint32_t ends[ENCODER_MAX_PARTS];
};

/* Open addressing with linear probing, at most half full. All zeros is an empty cache. */
struct cache {
	struct cache_entry *slots;
	unsigned bits; /* 1 << bits slots */
	size_t entries;
	size_t bytes;
	size_t longest; /* bytes of the longest entry since the cache was cleared */
};

static inline size_t cache_slot(const struct cache *cache, uint64_t id)
{
	return (size_t)(id * 0x9E3779B97F4A7C15ULL >> (64 - cache->bits));
}

/* Return the id's slot, or the free one that it would take; the cache must have slots. */
static inline struct cache_entry *cache_probe(const struct cache *cache, uint64_t id)
{
	size_t mask = ((size_t)1 << cache->bits) - 1, i = cache_slot(cache, id);

	while (cache->slots[i].data && cache->slots[i].id != id)
		i = (i + 1) & mask;
	return &cache->slots[i];
}

static inline const struct cache_entry *cache_find(const struct cache *cache, uint64_t id)
{
	if (!cache->slots)
		return NULL;
	const struct cache_entry *entry = cache_probe(cache, id);
	return entry->data ? entry : NULL;
}

static inline struct bytes cache_part(const struct cache_entry *entry, uint32_t part)
{
	uint32_t start = part ? entry->ends[part - 1] : 0;

	return (struct bytes){ entry->data + start, entry->ends[part] - start };
}

/* As encoder_remember(). */
bool cache_put(struct cache *cache, uint64_t id, const struct bytes *parts, size_t count);
void cache_clear(struct cache *cache);

#endif
