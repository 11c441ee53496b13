#include "kafka.h"

#include <string.h>

static bool find(const struct byte_strings *strings, int64_t row, const uint8_t **start, size_t *length)
{
	if (row < 0 || (uint64_t)row >= strings->count)
		return false;
	uint64_t at = (uint64_t)strings->starts[row], bytes = (uint64_t)strings->lengths[row];
	if (at > strings->size || bytes > strings->size - at)
		return false;
	*start = strings->data + at;
	*length = bytes;
	return true;
}

size_t kafka_messages(struct kafka_message *out, size_t count, const int64_t *rows, uint64_t batch,
		      const struct byte_strings *payloads, const struct byte_strings *keys)
{
	for (size_t i = 0; i < count; i++) {
		struct kafka_message *message = &out[i];
		int64_t row = rows ? rows[i] : (int64_t)i;

		memset(message, 0, sizeof(*message));
		if ((uint64_t)row >= KAFKA_MAX_ROWS || !find(payloads, row, &message->payload, &message->len) ||
		    !find(keys, row, &message->key, &message->key_len))
			return i;
		message->private = batch << KAFKA_ROW_BITS | (uint64_t)row;
	}
	return count;
}

bool kafka_next_run(const struct kafka_message *const *messages, size_t count, int64_t *rows, struct kafka_run *run)
{
	size_t i = run->first = run->end;

	if (i >= count)
		return false;
	run->batch = messages[i]->private >> KAFKA_ROW_BITS;
	run->err = messages[i]->err;
	while (i < count && messages[i]->private >> KAFKA_ROW_BITS == run->batch && messages[i]->err == run->err) {
		rows[i] = (int64_t)(messages[i]->private & (KAFKA_MAX_ROWS - 1));
		i++;
	}
	run->end = i;
	return true;
}
