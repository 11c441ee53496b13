/* Strings of messages: whether they are valid, and which are equal. No Python. */
#ifndef REBPF_TEXTS_H
#define REBPF_TEXTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define DECODE_MOST_CHARACTERS 4096u /* of a string; our names have up to 1024 */

enum decode_status {
	DECODE_OK,
	DECODE_INVALID, /* not a value of the schema */
	DECODE_TEXT_TOO_LONG,
	DECODE_MAP_TOO_LARGE,
};

/*
 * The distinct strings of a batch, found by an open-addressing table. The caller allocates room for one string per
 * message and column of strings, and at least twice as many slots (a power of two, all zero). `seed` is secret, so that no
 * writer can make strings collide.
 */
struct decode_strings {
	struct decode_text {
		const uint8_t *data;
		uint32_t size;
		uint64_t hash;
	} *texts;
	uint32_t *slots; /* index in texts, plus 1 */
	uint32_t mask;
	uint32_t count;
	uint32_t capacity;
	uint64_t seed;
};

static inline bool texts_equal(const struct decode_text *text, const uint8_t *data, size_t size)
{
	return text->size == size && memcmp(text->data, data, size) == 0;
}

/* Return whether a string is valid UTF-8, as Python judges, and of bounded length. */
enum decode_status texts_check(const uint8_t *data, size_t size);

/* Set `index` to that of a string, checked if it is new and not `is_checked`. The data must outlive the table. */
enum decode_status texts_intern(struct decode_strings *strings, const uint8_t *data, size_t size, bool is_checked,
				int64_t *index);

#endif
