#include "groups.h"
#include "hash.h"

#include <stdbool.h>

static bool is_equal(const int64_t *const *columns, size_t column_count, size_t left, size_t right)
{
	for (size_t i = 0; i < column_count; i++)
		if (columns[i][left] != columns[i][right])
			return false;
	return true;
}

static uint64_t hash_row(const int64_t *const *columns, size_t column_count, size_t row, uint64_t seed)
{
	uint64_t hash = ~seed;

	for (size_t i = 0; i < column_count; i++)
		hash = hash_word(hash, (uint64_t)columns[i][row], seed);
	return hash_word(hash, ~seed, seed);
}

size_t groups_find(const int64_t *const *columns, size_t column_count, size_t rows, uint64_t seed, uint32_t *slots,
		   uint32_t mask, int64_t *ids, int64_t *firsts)
{
	size_t count = 0;

	for (size_t row = 0; row < rows; row++) {
		if (row && is_equal(columns, column_count, row - 1, row)) {
			ids[row] = ids[row - 1];
			continue;
		}
		uint32_t slot = (uint32_t)hash_row(columns, column_count, row, seed) & mask;
		while (slots[slot] && !is_equal(columns, column_count, (size_t)firsts[slots[slot] - 1], row))
			slot = (slot + 1) & mask;
		if (!slots[slot]) {
			firsts[count++] = (int64_t)row;
			slots[slot] = (uint32_t)count;
		}
		ids[row] = (int64_t)slots[slot] - 1;
	}
	return count;
}

size_t groups_mark(uint8_t *bits, size_t size, const int64_t *positions, size_t count, uint8_t *is_new)
{
	for (size_t i = 0; i < count; i++) {
		if (positions[i] < 0 || (uint64_t)positions[i] / 8 >= size)
			return i;
		uint8_t *byte = &bits[positions[i] / 8];
		uint8_t bit = (uint8_t)(1u << (positions[i] % 8));
		is_new[i] = !(*byte & bit);
		*byte |= bit;
	}
	return count;
}
