#include "kafka.h"

#include <stdbool.h>
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

void kafka_reports(const struct kafka_message *const *messages, size_t count, int32_t *err, uint64_t *private)
{
	for (size_t i = 0; i < count; i++) {
		err[i] = messages[i]->err;
		private[i] = messages[i]->private;
	}
}
