#include "decode.h"

#include <string.h>

struct cursor {
	const uint8_t *at;
	const uint8_t *end;
};

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers are read as they lie in memory");

#define HIGH_BITS 0x8080808080808080u

static inline int64_t unzigzag(uint64_t bits)
{
	return (int64_t)((bits >> 1) ^ (~(bits & 1) + 1));
}

/* Avro's zig-zag varint; false if it is cut off or has more than 64 bits. */
static bool read_long_slowly(struct cursor *in, int64_t *value)
{
	uint64_t bits = 0;

	for (unsigned int shift = 0; shift < 64 && in->at < in->end; shift += 7) {
		uint8_t byte = *in->at++;

		if (shift == 63 && byte > 1)
			return false;
		bits |= (uint64_t)(byte & 0x7f) << shift;
		if (byte < 0x80) {
			*value = unzigzag(bits);
			return true;
		}
	}
	return false;
}

/* The same, without a branch for each byte where the number has up to 8 bytes and as many are there. */
static inline bool read_long(struct cursor *in, int64_t *value)
{
	uint64_t word, last;

	if (in->end - in->at < (ptrdiff_t)sizeof(word))
		return read_long_slowly(in, value);
	memcpy(&word, in->at, sizeof(word));
	last = ~word & HIGH_BITS;
	if (!last)
		return read_long_slowly(in, value);
	word &= (last ^ (last - 1)) & ~HIGH_BITS;
	word = (word & 0x007f007f007f007f) | (word & 0x7f007f007f007f00) >> 1;
	word = (word & 0x00003fff00003fff) | (word & 0x3fff00003fff0000) >> 2;
	word = (word & 0x000000000fffffff) | (word & 0x0fffffff00000000) >> 4;
	in->at += (__builtin_ctzll(last) >> 3) + 1;
	*value = unzigzag(word);
	return true;
}

static inline bool skip_long(struct cursor *in)
{
	uint64_t word, last;
	int64_t value;

	if (in->end - in->at < (ptrdiff_t)sizeof(word))
		return read_long_slowly(in, &value);
	memcpy(&word, in->at, sizeof(word));
	last = ~word & HIGH_BITS;
	if (!last)
		return read_long_slowly(in, &value);
	in->at += (__builtin_ctzll(last) >> 3) + 1;
	return true;
}

static inline bool read_fixed(struct cursor *in, void *value, size_t size)
{
	if ((size_t)(in->end - in->at) < size)
		return false;
	memcpy(value, in->at, size);
	in->at += size;
	return true;
}

static bool read_float(struct cursor *in, int64_t *cell)
{
	float value;
	double wide;

	if (!read_fixed(in, &value, sizeof(value)))
		return false;
	wide = value;
	memcpy(cell, &wide, sizeof(wide));
	return true;
}

static inline bool read_bytes(struct cursor *in, const uint8_t **data, size_t *size)
{
	int64_t length;

	if (!read_long(in, &length) || length < 0 || length > in->end - in->at)
		return false;
	*data = in->at;
	*size = (size_t)length;
	in->at += length;
	return true;
}

/* Return the string of the row before, most often the same; NULL if there is none. */
static inline const struct decode_text *text_before(const struct decode_strings *strings, const int64_t *cell,
						    size_t row)
{
	/* The row before may have been refused, or be null: any index of a string will do. */
	return row > 0 && cell[-1] >= 0 && cell[-1] < strings->count ? &strings->texts[cell[-1]] : NULL;
}

static inline enum decode_status read_string(struct cursor *in, int64_t *cell, size_t row,
					     struct decode_columns *columns)
{
	const struct decode_text *before;
	const uint8_t *data;
	size_t size;

	if (!read_bytes(in, &data, &size))
		return DECODE_INVALID;
	if (!cell)
		return texts_check(data, size);
	before = text_before(&columns->strings, cell, row);
	if (before && texts_equal(before, data, size)) {
		*cell = cell[-1];
		return DECODE_OK;
	}
	return texts_intern(&columns->strings, data, size, false, cell);
}

/* Read the number of items of a list's next block, 0 at its end. Each item has at least one byte. */
static bool read_block(struct cursor *in, int64_t *items)
{
	int64_t size;

	if (!read_long(in, items))
		return false;
	if (*items < 0) {
		if (*items == INT64_MIN || !read_long(in, &size))
			return false;
		*items = -*items;
	}
	return *items <= in->end - in->at;
}

/* Check a map of strings, and leave the cursor behind it. */
static enum decode_status skip_map(struct cursor *in)
{
	size_t pairs = 0;
	int64_t items;

	while (read_block(in, &items)) {
		if (!items)
			return DECODE_OK;
		if (items > DECODE_MOST_PAIRS || (pairs += (size_t)items) > DECODE_MOST_PAIRS)
			return DECODE_MAP_TOO_LARGE;
		for (int64_t i = 0; i < 2 * items; i++) {
			const uint8_t *data;
			size_t size;
			enum decode_status status;

			if (!read_bytes(in, &data, &size))
				return DECODE_INVALID;
			status = texts_check(data, size);
			if (status)
				return status;
		}
	}
	return DECODE_INVALID;
}

static enum decode_status read_map(struct cursor *in, int64_t *cell, size_t row, struct decode_columns *columns)
{
	const struct decode_text *before = cell ? text_before(&columns->maps, cell, row) : NULL;
	const uint8_t *start = in->at;
	enum decode_status status;

	/* No map is the beginning of another one. */
	if (before && before->size <= (size_t)(in->end - in->at) && memcmp(before->data, in->at, before->size) == 0) {
		in->at += before->size;
		*cell = cell[-1];
		return DECODE_OK;
	}
	status = skip_map(in);
	if (status || !cell)
		return status;
	return texts_intern(&columns->maps, start, (size_t)(in->at - start), true, cell);
}

static inline bool read_number(struct cursor *in, enum decode_type type, int64_t *cell)
{
	uint8_t byte;

	switch (type) {
	case DECODE_BOOLEAN:
		if (!read_fixed(in, &byte, 1) || byte > 1)
			return false;
		*cell = byte;
		return true;
	case DECODE_INT:
		return read_long(in, cell) && *cell >= INT32_MIN && *cell <= INT32_MAX;
	case DECODE_LONG:
		return read_long(in, cell);
	case DECODE_FLOAT:
		return read_float(in, cell);
	default:
		return read_fixed(in, cell, sizeof(*cell));
	}
}

/* Read a field that is not null and not a list; `cell` is NULL if it is skipped. */
static inline enum decode_status read_field(struct cursor *in, enum decode_type type, int64_t *cell, size_t row,
					    struct decode_columns *columns)
{
	const uint8_t *data;
	int64_t skipped;
	size_t size;
	bool ok;

	if (type == DECODE_STRING)
		return read_string(in, cell, row, columns);
	if (type == DECODE_MAP)
		return read_map(in, cell, row, columns);
	if (type == DECODE_BYTES)
		ok = read_bytes(in, &data, &size);
	else if (!cell && (type == DECODE_LONG || type == DECODE_INT))
		ok = skip_long(in);
	else
		ok = read_number(in, type, cell ? cell : &skipped);
	return ok ? DECODE_OK : DECODE_INVALID;
}

/* Read the branch of a union, which has two; set `is_null`. */
static inline bool read_branch(struct cursor *in, uint8_t null, bool *is_null)
{
	int64_t branch;

	if (in->at < in->end && (*in->at & ~2) == 0)
		branch = *in->at++ >> 1;
	else if (!read_long_slowly(in, &branch) || branch < 0 || branch > 1)
		return false;
	*is_null = branch == (null == DECODE_NULL_FIRST ? 0 : 1);
	return true;
}

int64_t decode_schema_id(const uint8_t *value, size_t size)
{
	if (!value || size < DECODE_FRAME_BYTES || value[0] != 0)
		return DECODE_NOT_FRAMED;
	if (size > DECODE_MOST_VALUE_BYTES)
		return DECODE_VALUE_TOO_LONG;
	return (int64_t)((uint32_t)value[1] << 24 | (uint32_t)value[2] << 16 | (uint32_t)value[3] << 8 | value[4]);
}

bool decode_plan_valid(const struct decode_step *steps, size_t count, size_t columns)
{
	uint8_t used[DECODE_MOST_STEPS / 8] = { 0 };
	uint16_t open[DECODE_MOST_DEPTH];
	size_t depth = 0;

	if (count > DECODE_MOST_STEPS || columns > DECODE_MOST_STEPS)
		return false;
	for (size_t at = 0; at < count; at++) {
		const struct decode_step *step = &steps[at];

		if (step->type >= DECODE_TYPES || step->null >= DECODE_NULLS || step->column < -1)
			return false;
		if (step->column >= 0) {
			uint8_t bit = (uint8_t)(1u << (step->column % 8));

			if (depth || (size_t)step->column >= columns || step->type == DECODE_ARRAY ||
			    step->type == DECODE_END || step->type == DECODE_BYTES || (used[step->column / 8] & bit))
				return false;
			used[step->column / 8] |= bit;
		}
		if (step->type == DECODE_ARRAY) {
			if (depth == DECODE_MOST_DEPTH || step->other >= count || step->null)
				return false;
			open[depth++] = (uint16_t)at;
		} else if (step->type == DECODE_END) {
			/* A list without items' steps would take no bytes for each item. */
			if (!depth || step->null || step->other != open[depth - 1] || step->other + 1u == at ||
			    steps[step->other].other != at)
				return false;
			depth--;
		}
	}
	return depth == 0;
}

/* Read a record, and leave the cursor behind it. */
static inline enum decode_status read_record(const struct decode_step *steps, size_t count, struct cursor *in,
					     size_t row, struct decode_columns *columns)
{
	int64_t items[DECODE_MOST_DEPTH]; /* left in the open lists' blocks */
	size_t depth = 0, at = 0;

	while (at < count) {
		const struct decode_step *step = &steps[at];
		int64_t *cell = step->column < 0 ? NULL : &columns->cells[(size_t)step->column * columns->rows + row];
		enum decode_status status;
		bool is_null = false;

		if (step->type == DECODE_ARRAY || step->type == DECODE_END) {
			bool starts = step->type == DECODE_ARRAY;

			if (starts)
				items[depth++] = 0;
			else
				items[depth - 1]--;
			if (items[depth - 1] == 0 && !read_block(in, &items[depth - 1]))
				return DECODE_INVALID;
			if (items[depth - 1] == 0) {
				depth--;
				at = (starts ? step->other : at) + 1u;
			} else {
				at = (starts ? at : step->other) + 1u;
			}
			continue;
		}
		if (step->null && !read_branch(in, step->null, &is_null))
			return DECODE_INVALID;
		if (cell)
			columns->valid[(size_t)step->column * columns->rows + row] = !is_null;
		if (is_null) {
			if (cell)
				*cell = 0;
		} else {
			status = read_field(in, step->type, cell, row, columns);
			if (status)
				return status;
		}
		at++;
	}
	return DECODE_OK;
}

bool decode_next_pair(struct decode_pairs *pairs, struct decode_text *key, struct decode_text *value)
{
	struct cursor in = { pairs->at, pairs->end };
	size_t sizes[2];

	if (!pairs->items && !(read_block(&in, &pairs->items) && pairs->items))
		return false;
	if (!read_bytes(&in, &key->data, &sizes[0]) || !read_bytes(&in, &value->data, &sizes[1]))
		return false;
	key->size = (uint32_t)sizes[0];
	value->size = (uint32_t)sizes[1];
	pairs->at = in.at;
	pairs->items--;
	return true;
}

enum decode_status decode_value(const struct decode_step *steps, size_t count, const uint8_t *value, size_t size,
				size_t row, struct decode_columns *columns)
{
	enum decode_status status;
	struct cursor in;

	if (decode_schema_id(value, size) < 0)
		return DECODE_INVALID;
	in = (struct cursor){ value + DECODE_FRAME_BYTES, value + size };
	status = read_record(steps, count, &in, row, columns);
	if (status)
		return status;
	return in.at == in.end ? DECODE_OK : DECODE_INVALID;
}

bool decode_lengths(const struct decode_step *steps, size_t count, const uint8_t *data, size_t size, int64_t *lengths,
		    size_t records)
{
	struct cursor in = { data, data + size };

	for (size_t record = 0; record < records; record++) {
		const uint8_t *start = in.at;

		if (read_record(steps, count, &in, record, NULL))
			return false;
		lengths[record] = in.at - start;
	}
	return in.at == in.end;
}
