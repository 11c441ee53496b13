/* Groups of equal rows, and sets of numbers as bits: what the readers of columns need per row. No Python. */
#ifndef REBPF_GROUPS_H
#define REBPF_GROUPS_H

#include <stddef.h>
#include <stdint.h>

/*
 * Number the distinct rows of `columns` from 0 in order of their first appearance: ids[row] is the number, and
 * firsts[number] the first row. Return how many there are. `slots` has a power of two of zeros, at least twice the
 * rows; `mask` is one less. `seed` is secret, so that no writer can make rows collide.
 */
size_t groups_find(const int64_t *const *columns, size_t column_count, size_t rows, uint64_t seed, uint32_t *slots,
		   uint32_t mask, int64_t *ids, int64_t *firsts);

/*
 * Set the bits at `positions` in order; is_new[i] is 1 if the bit was not set. Return `count`, or the index of the
 * first position outside the `size` bytes.
 */
size_t groups_mark(uint8_t *bits, size_t size, const int64_t *positions, size_t count, uint8_t *is_new);

#endif
