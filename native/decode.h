/*
 * Decodes messages in Confluent's wire format (a zero byte, a schema id in four bytes, an Avro record) to columns.
 *
 * Every message is untrusted. A plan made from the writer's schema says what follows what; nothing in a message can make
 * the decoder read outside the message, recurse, or allocate: all memory is the caller's, and its size depends on the
 * number of messages and columns only. A message that does not fit the plan is refused, and costs no other message.
 */
#ifndef REBPF_DECODE_H
#define REBPF_DECODE_H

#include "texts.h"

#define DECODE_MOST_VALUE_BYTES (1u << 20)
#define DECODE_MOST_PAIRS 64u /* of a map; ours have up to 16 */
#define DECODE_MOST_STEPS 4096
#define DECODE_MOST_DEPTH 4
#define DECODE_FRAME_BYTES 5

enum decode_type {
	DECODE_BOOLEAN,
	DECODE_INT,
	DECODE_LONG,
	DECODE_FLOAT,
	DECODE_DOUBLE,
	DECODE_BYTES,
	DECODE_STRING,
	DECODE_ARRAY, /* its items' steps follow, up to its DECODE_END */
	DECODE_END,
	DECODE_MAP, /* of strings; without a column it may also be a DECODE_ARRAY of two strings */
	DECODE_TYPES,
};

enum decode_null {
	DECODE_NOT_NULL, /* the field is no union */
	DECODE_NULL_FIRST, /* ["null", T] */
	DECODE_NULL_LAST, /* [T, "null"] */
	DECODE_NULLS,
};

#define DECODE_NOT_FRAMED (-1)
#define DECODE_VALUE_TOO_LONG (-2)

/* A step of a plan. Steps of lists refer to each other: DECODE_ARRAY to its DECODE_END, and back. */
struct decode_step {
	uint8_t type;
	uint8_t null;
	uint16_t other;
	int16_t column; /* -1: skip the field */
	uint16_t _pad;
};

/*
 * Columns of `rows` cells each, column by column: integers and booleans as int64, float and double as the bits of a
 * double, strings as the index in `strings`, maps as the index in `maps`. A cell that is null has `valid` 0.
 */
struct decode_columns {
	int64_t *cells;
	uint8_t *valid;
	size_t rows;
	struct decode_strings strings;
	struct decode_strings maps; /* as they were written: equal maps may differ in order and blocks */
};

/* Return a value's schema id, DECODE_NOT_FRAMED or DECODE_VALUE_TOO_LONG. `value` may be NULL. */
int64_t decode_schema_id(const uint8_t *value, size_t size);

/* Return whether a plan is well formed, with its columns in 0 to `columns` - 1, each of one step at most. */
bool decode_plan_valid(const struct decode_step *steps, size_t count, size_t columns);

/* Strings of a map in `maps`, in order: each key is followed by its value. */
struct decode_pairs {
	const uint8_t *at;
	const uint8_t *end;
	int64_t items; /* left in the block */
};

/* Read the next pair; return false at the end. */
bool decode_next_pair(struct decode_pairs *pairs, struct decode_text *key, struct decode_text *value);

/* Decode a framed value to row `row`. Of a message that is refused, the row's cells are undefined. */
enum decode_status decode_value(const struct decode_step *steps, size_t count, const uint8_t *value, size_t size,
				size_t row, struct decode_columns *columns);

/*
 * Set the lengths of records that follow each other without frames, as in an Avro file's block. The plan has no columns.
 * Return false if the data are not that many records of the plan.
 */
bool decode_lengths(const struct decode_step *steps, size_t count, const uint8_t *data, size_t size, int64_t *lengths,
		    size_t records);

#endif
