/* Programs, strings, cached ids and rows from the fuzzer's bytes: valid ones stay as they are (tests/native/seeds.py). */
#include <stdlib.h>
#include <string.h>

#include "encode.h"
#include "kafka.h"
#include "input.h"

#define MAX_STRINGS 64
#define MAX_ROWS 16

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint16_t take_number(void)
{
	uint16_t number;

	take(&number, sizeof(number));
	return number;
}

/* Memory of the exact size, filled from the input. */
static uint8_t *take_block(size_t count)
{
	uint8_t *block = malloc(count ? count : 1);

	take(block, count);
	return block;
}

static struct step *take_steps(size_t count, size_t row_size, size_t strings)
{
	struct step *steps = (struct step *)take_block(count * sizeof(struct step));

	for (size_t i = 0; i < count; i++) {
		steps[i].kind %= STEP_KINDS + 1;
		steps[i].offset %= row_size + 32;
		steps[i].known_offset %= row_size + 32;
		if (steps[i].first < 1U << 31) /* keep some that overflow */
			steps[i].first %= strings + 3;
		if (steps[i].count < 1U << 31)
			steps[i].count %= strings + 3;
	}
	return steps;
}

static void check_spans(const struct spans *spans, size_t rows, size_t written, bool all)
{
	bool none_failed = true;

	for (size_t i = 0; i < rows; i++) {
		none_failed &= spans->lengths[i] >= 0;
		check(spans->starts[i] >= 0 && (size_t)spans->starts[i] <= written);
		check(spans->lengths[i] < 0 || (size_t)(spans->starts[i] + spans->lengths[i]) <= written);
		check(spans->key_starts[i] >= 0 && spans->key_lengths[i] >= 0);
		check((size_t)(spans->key_starts[i] + spans->key_lengths[i]) <= written);
	}
	check(none_failed == all);
}

static void fill_messages(const uint8_t *out, size_t written, const struct spans *spans, size_t rows)
{
	struct byte_strings payloads = { out, written, spans->starts, spans->lengths, rows };
	struct byte_strings keys = { out, written, spans->key_starts, spans->key_lengths, rows };
	struct kafka_message messages[MAX_ROWS];
	const struct kafka_message *pointers[MAX_ROWS];
	int64_t chosen[MAX_ROWS], reported[MAX_ROWS];
	struct kafka_run run = { 0 };

	for (size_t i = 0; i < MAX_ROWS; i++) {
		chosen[i] = (int16_t)take_number();
		pointers[i] = &messages[i];
	}
	size_t count = kafka_messages(messages, rows, NULL, 7, &payloads, &keys);
	/* One result for all: one run. */
	check(kafka_next_run(pointers, count, reported, &run) == (count > 0));
	check(run.end == count && (!count || (run.batch == 7 && run.err == 0)));
	check(!kafka_next_run(pointers, count, reported, &run));
	for (size_t i = 0; i < count; i++)
		check(reported[i] == (int64_t)i);
	kafka_messages(messages, MAX_ROWS, chosen, 7, &payloads, &keys);
	/* Starts and lengths from the input. */
	take(spans->starts, rows * sizeof(int64_t));
	take(spans->lengths, rows * sizeof(int64_t));
	kafka_messages(messages, rows, NULL, 7, &payloads, &keys);
}

static void encode(struct encoder *encoder, struct rows rows)
{
	size_t bound = encoder_bound(encoder, rows.count), written;
	uint8_t *out = malloc(bound ? bound : 1);
	int64_t *block = malloc(4 * MAX_ROWS * sizeof(int64_t)), utc_offset;
	struct spans spans = { block, block + rows.count, block + 2 * rows.count, block + 3 * rows.count };

	take(&utc_offset, sizeof(utc_offset));
	bool all = encoder_encode(encoder, rows, utc_offset, out, spans, &written);
	check(written <= bound);
	check_spans(&spans, rows.count, written, all);
	fill_messages(out, written, &spans, rows.count);
	free(out);
	free(block);
}

static void remember(struct encoder *encoder, uint64_t id)
{
	struct bytes parts[ENCODER_MAX_PARTS + 1];
	size_t count = take_number() % (ENCODER_MAX_PARTS + 2);

	for (size_t i = 0; i < count; i++) {
		size_t length = take_number() % 600;
		parts[i] = (struct bytes){ take_block(length), length };
	}
	check(encoder_remember(encoder, id, parts, count) == (count <= ENCODER_MAX_PARTS));
	for (size_t i = 0; i < count; i++)
		free((void *)parts[i].data);
}

static void use(struct encoder *encoder, size_t row_size)
{
	size_t count = take_number() % (MAX_ROWS + 1), gap = take_number() % 16;
	size_t size = count ? count * row_size + (count - 1) * gap : 0;
	uint8_t *data = take_block(size);
	struct rows rows = { data, count, (ptrdiff_t)(row_size + gap) };
	uint64_t ids[4];

	encode(encoder, rows);
	size_t missing = encoder_missing(encoder, rows, ids, 4);
	for (size_t i = 0; i < missing; i++)
		remember(encoder, ids[i]);
	encode(encoder, rows);
	if (count) { /* backwards */
		rows.data += (ptrdiff_t)(count - 1) * rows.stride;
		rows.stride = -rows.stride;
		encode(encoder, rows);
	}
	/* At times, enough ids that all are forgotten. */
	for (uint64_t i = 0, most = take_number() % 256 == 1 ? ENCODER_MAX_ENTRIES + 9 : 3; i < most; i++)
		check(encoder_remember(encoder, i << 32, &(struct bytes){ data, size % 9 }, 1));
	encode(encoder, rows);
	encoder_forget(encoder);
	free(data);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct bytes strings[MAX_STRINGS];
	const char *reason;

	bytes = data;
	left = size;
	size_t value_steps = take_number() % 64, key_steps = take_number() % 16;
	size_t string_count = take_number() % MAX_STRINGS, row_size = take_number() % 512;
	for (size_t i = 0; i < string_count; i++) {
		size_t length = take_number() % 1024;
		strings[i] = (struct bytes){ take_block(length), length };
	}
	struct step *value = take_steps(value_steps, row_size, string_count);
	struct step *key = take_steps(key_steps, row_size, string_count);
	struct encoder *encoder =
		encoder_new(value, value_steps, key, key_steps, strings, string_count, row_size, &reason);
	check(encoder || reason);
	free(value);
	free(key);
	for (size_t i = 0; i < string_count; i++)
		free((void *)strings[i].data);
	if (encoder)
		use(encoder, row_size);
	encoder_free(encoder);
	return 0;
}
