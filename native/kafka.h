/* Arrays of librdkafka's messages: filled for rd_kafka_produce_batch(), read from delivery reports. No Python. */
#ifndef REBPF_KAFKA_H
#define REBPF_KAFKA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* struct rd_kafka_message_s of rdkafka.h, which is part of its ABI. */
struct kafka_message {
	int32_t err;
	void *rkt;
	int32_t partition;
	const uint8_t *payload;
	size_t len;
	const uint8_t *key;
	size_t key_len;
	int64_t offset;
	uint64_t private;
};

_Static_assert(sizeof(struct kafka_message) == 72, "rd_kafka_message_t has another size on this machine");

/* Byte strings in one buffer: string i is data[starts[i]] to data[starts[i] + lengths[i] - 1]. */
struct byte_strings {
	const uint8_t *data;
	size_t size;
	const int64_t *starts;
	const int64_t *lengths;
	size_t count;
};

#define KAFKA_ROW_BITS 20
#define KAFKA_MAX_ROWS ((size_t)1 << KAFKA_ROW_BITS)
#define KAFKA_MAX_BATCH (((uint64_t)1 << (64 - KAFKA_ROW_BITS)) - 1)

/*
 * Fill `count` messages with the rows of a batch at the indexes `rows`, or with its first `count` rows if `rows` is NULL.
 * Return `count`, or the index of the first row that is outside the batch or whose bytes are outside their buffer.
 */
size_t kafka_messages(struct kafka_message *out, size_t count, const int64_t *rows, uint64_t batch,
		      const struct byte_strings *payloads, const struct byte_strings *keys);

/* Reports from `first` to before `end` of messages of one batch with the same result. */
struct kafka_run {
	uint64_t batch;
	int32_t err;
	size_t first;
	size_t end;
};

/*
 * Copy the rows of the messages from `run->end` on, as long as batch and result stay the same, and describe them in
 * `run`. False if there are no more of the `count` messages.
 */
bool kafka_next_run(const struct kafka_message *const *messages, size_t count, int64_t *rows, struct kafka_run *run);

#endif
