#include "texts.h"
#include "hash.h"

#define HIGH_BITS 0x8080808080808080u

static bool is_continuation(uint8_t byte)
{
	return (byte & 0xc0) == 0x80;
}

/* Return the length of the UTF-8 sequence at `at`, of more than one byte; 0 if it is not valid, as Python judges. */
static size_t sequence_length(const uint8_t *at, size_t room)
{
	if (room < 2 || !is_continuation(at[1]))
		return 0;
	if (at[0] >= 0xc2 && at[0] < 0xe0)
		return 2;
	if (room < 3 || !is_continuation(at[2]))
		return 0;
	if (at[0] >= 0xe0 && at[0] < 0xf0) {
		bool overlong = at[0] == 0xe0 && at[1] < 0xa0;
		bool surrogate = at[0] == 0xed && at[1] >= 0xa0;

		return overlong || surrogate ? 0 : 3;
	}
	if (room < 4 || !is_continuation(at[3]) || at[0] < 0xf0 || at[0] > 0xf4)
		return 0;
	return (at[0] == 0xf0 && at[1] < 0x90) || (at[0] == 0xf4 && at[1] >= 0x90) ? 0 : 4;
}

static inline bool is_ascii(const uint8_t *data, size_t size)
{
	uint64_t word, all = 0;
	size_t at = 0;

	if (size < sizeof(word)) {
		while (at < size)
			all |= data[at++];
		return !(all & 0x80);
	}
	for (; at + sizeof(word) <= size; at += sizeof(word)) {
		memcpy(&word, data + at, sizeof(word));
		all |= word;
	}
	memcpy(&word, data + size - sizeof(word), sizeof(word));
	return !((all | word) & HIGH_BITS);
}

static enum decode_status check_characters(const uint8_t *data, size_t size)
{
	size_t characters = 0;

	for (size_t at = 0; at < size; characters++) {
		size_t length = data[at] < 0x80 ? 1 : sequence_length(data + at, size - at);

		if (!length)
			return DECODE_INVALID;
		at += length;
	}
	return characters > DECODE_MOST_CHARACTERS ? DECODE_TEXT_TOO_LONG : DECODE_OK;
}

enum decode_status texts_check(const uint8_t *data, size_t size)
{
	return size <= DECODE_MOST_CHARACTERS && is_ascii(data, size) ? DECODE_OK : check_characters(data, size);
}

static uint64_t hash_text(const uint8_t *data, size_t size, uint64_t seed)
{
	uint64_t hash = hash_word(~seed, size, seed), word;

	for (; size >= sizeof(word); data += sizeof(word), size -= sizeof(word)) {
		memcpy(&word, data, sizeof(word));
		hash = hash_word(hash, word, seed);
	}
	word = 0;
	memcpy(&word, data, size);
	return hash_word(hash_word(hash, word, seed), ~seed, seed);
}

enum decode_status texts_intern(struct decode_strings *strings, const uint8_t *data, size_t size, bool is_checked,
				int64_t *index)
{
	enum decode_status status;
	uint64_t hash;
	uint32_t slot;

	hash = hash_text(data, size, strings->seed);
	for (slot = (uint32_t)hash & strings->mask; strings->slots[slot]; slot = (slot + 1) & strings->mask) {
		uint32_t found = strings->slots[slot] - 1;

		if (strings->texts[found].hash == hash && texts_equal(&strings->texts[found], data, size)) {
			*index = found;
			return DECODE_OK;
		}
	}
	status = is_checked ? DECODE_OK : texts_check(data, size);
	if (status)
		return status;
	if (strings->count == strings->capacity)
		return DECODE_INVALID; /* the caller gave less room than promised */
	strings->texts[strings->count] = (struct decode_text){ data, (uint32_t)size, hash };
	*index = strings->count++;
	strings->slots[slot] = (uint32_t)*index + 1;
	return DECODE_OK;
}
