#include "cache.h"

#include <stdlib.h>
#include <string.h>

#define FIRST_BITS 6

static bool grow(struct cache *cache)
{
	struct cache old = *cache;

	cache->bits = old.slots ? old.bits + 1 : FIRST_BITS;
	cache->slots = calloc((size_t)1 << cache->bits, sizeof(*cache->slots));
	if (!cache->slots) {
		*cache = old;
		return false;
	}
	for (size_t i = 0; old.slots && i < (size_t)1 << old.bits; i++)
		if (old.slots[i].data)
			*cache_probe(cache, old.slots[i].id) = old.slots[i];
	free(old.slots);
	return true;
}

static size_t entry_bytes(const struct cache_entry *entry)
{
	return entry->ends[ENCODER_MAX_PARTS - 1];
}

static bool fill(struct cache_entry *entry, uint64_t id, const struct bytes *parts, size_t count)
{
	size_t end = 0;

	*entry = (struct cache_entry){ .id = id };
	for (size_t i = 0; i < ENCODER_MAX_PARTS; i++) {
		end += i < count ? parts[i].length : 0;
		entry->ends[i] = (uint32_t)end;
	}
	entry->data = malloc(end + 1);
	for (size_t i = 0, at = 0; entry->data && i < count; at = entry->ends[i++])
		if (parts[i].length)
			memcpy(entry->data + at, parts[i].data, parts[i].length);
	return entry->data;
}

bool cache_put(struct cache *cache, uint64_t id, const struct bytes *parts, size_t count)
{
	struct cache_entry entry, *slot;

	if (count > ENCODER_MAX_PARTS)
		return false;
	for (size_t i = 0; i < count; i++)
		if (parts[i].length > ENCODER_MAX_STRING)
			return false;
	if (!fill(&entry, id, parts, count))
		return false;
	if (cache->entries == ENCODER_MAX_ENTRIES || cache->bytes + entry_bytes(&entry) > ENCODER_MAX_CACHE_BYTES)
		cache_clear(cache);
	if ((!cache->slots || cache->entries >= (size_t)1 << (cache->bits - 1)) && !grow(cache)) {
		free(entry.data);
		return false;
	}
	slot = cache_probe(cache, id);
	if (slot->data) {
		cache->bytes -= entry_bytes(slot);
		cache->entries--;
		free(slot->data);
	}
	*slot = entry;
	cache->entries++;
	cache->bytes += entry_bytes(&entry);
	if (entry_bytes(&entry) > cache->longest)
		cache->longest = entry_bytes(&entry);
	return true;
}

void cache_clear(struct cache *cache)
{
	for (size_t i = 0; cache->slots && i < (size_t)1 << cache->bits; i++)
		free(cache->slots[i].data);
	free(cache->slots);
	*cache = (struct cache){ 0 };
}
