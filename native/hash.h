/* The hash of tables whose keys strangers choose. */
#ifndef REBPF_HASH_H
#define REBPF_HASH_H

#include <stdint.h>

/*
 * Add a word to a hash. The secret multiplier and the upper half of the product are what keeps a writer from choosing
 * keys that collide: with a known multiplier, flipping the highest bit changes the hash in a known way.
 */
static inline uint64_t hash_word(uint64_t hash, uint64_t word, uint64_t secret)
{
	__extension__ unsigned __int128 product = (unsigned __int128)(hash ^ word) * (secret | 1);

	return (uint64_t)product ^ (uint64_t)(product >> 64);
}

#endif
