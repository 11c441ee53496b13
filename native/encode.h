/*
 * Encodes rows (fixed-size records of a ring) as framed Avro messages and Kafka keys. No Python.
 *
 * A program, an array of steps, says what a message consists of, in order. It is made from the schema and the row's
 * layout (producer/encode/plan.py), so that a new field needs no change here. Programs are checked once, by
 * encoder_new(); rows may hold anything.
 *
 * The format: https://avro.apache.org/docs/1.12.0/specification/#binary-encoding
 */
#ifndef REBPF_ENCODE_H
#define REBPF_ENCODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "rows.h"

enum step_kind {
	STEP_CONSTANT, /* the string `first`, as it is */
	STEP_INTEGER, /* int or long: (row[offset] + offset to UTC if `utc`) / divisor */
	STEP_BOOLEAN, /* row[offset] != 0 */
	STEP_NAME, /* one of `count` strings from `first` on, by number; the last one for all higher numbers */
	STEP_ADDRESS, /* string: 16 bytes as text in the form of RFC 5952; IPv4-mapped ones as IPv4 */
	STEP_CACHED, /* part `first` of what is remembered of the id at `offset`; the string `count` if nothing is */
	STEP_KEY_ADDRESS, /* the address without a length, IPv6 in brackets */
	STEP_KEY_NUMBER, /* an unsigned integer in decimal */
	STEP_TEXT, /* string: `width` bytes up to a zero; % and all but printable ASCII percent-encoded (RFC 3986) */
	STEP_KINDS,
};

/* Packed by Python: little-endian, without holes. */
struct step {
	uint8_t kind;
	uint8_t width; /* bytes of the number: 1, 2, 4 or 8; or of the text */
	uint8_t is_signed;
	uint8_t nullable; /* a union [null, T]: its branch precedes the value */
	uint8_t known_mask; /* null unless one of these bits of row[known_offset] is set; 0: never null */
	uint8_t utc;
	uint8_t shift, is_inside; /* set by encoder_new(): 64 - bits; whether 8 bytes can be read */
	uint32_t offset;
	uint32_t known_offset;
	uint32_t first;
	uint32_t count;
	int64_t least; /* numbers outside [least, most] cannot be encoded; unsigned ones have most only */
	uint64_t most;
	int64_t divisor;
};

_Static_assert(sizeof(struct step) == 48, "producer/encode/plan.py packs another struct step");

struct bytes {
	const uint8_t *data;
	size_t length;
};

struct encoder;

#define ENCODER_MAX_STEPS 4096
#define ENCODER_MAX_STRING ((size_t)1 << 20)
#define ENCODER_MAX_PARTS 4
#define ENCODER_MAX_ENTRIES ((size_t)1 << 14)
#define ENCODER_MAX_CACHE_BYTES ((size_t)8 << 20)

/*
 * Return an encoder of rows of `row_size` bytes; strings are copied. NULL with a reason for a program that reads
 * outside the row or the strings, and NULL without one when memory runs out.
 */
struct encoder *encoder_new(const struct step *value, size_t value_steps, const struct step *key, size_t key_steps,
			    const struct bytes *strings, size_t string_count, size_t row_size, const char **reason);
void encoder_free(struct encoder *encoder);

size_t encoder_row_size(const struct encoder *encoder);

/* Return how many bytes `rows` messages and their keys have at most, with what is remembered now. */
size_t encoder_bound(const struct encoder *encoder, size_t rows);

/* Collects up to `limit` distinct ids of rows of which nothing is remembered; returns how many. */
size_t encoder_missing(const struct encoder *encoder, struct rows rows, uint64_t *ids, size_t limit);

/*
 * Remember the parts of an id, in place of earlier ones; the others are empty. Forget all ids first if there would be
 * more than ENCODER_MAX_ENTRIES, or more than ENCODER_MAX_CACHE_BYTES. False when memory runs out.
 */
bool encoder_remember(struct encoder *encoder, uint64_t id, const struct bytes *parts, size_t count);
void encoder_forget(struct encoder *encoder);

/* Where messages and keys are in `out`. A length below 0 is that of a row that cannot be encoded: -1 - its step. */
struct spans {
	int64_t *starts;
	int64_t *lengths;
	int64_t *key_starts;
	int64_t *key_lengths;
};

/*
 * Encode rows into `out`, which has encoder_bound() bytes, and set `*written` to the number of bytes. A key that is the
 * same for all rows is written once. False if some row cannot be encoded.
 */
bool encoder_encode(const struct encoder *encoder, struct rows rows, int64_t utc_offset, uint8_t *out,
		    struct spans spans, size_t *written);

#endif
