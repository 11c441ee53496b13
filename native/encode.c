#include "encode.h"

#include <stdlib.h>
#include <string.h>

#include "address.h"
#include "cache.h"
#include "memo.h"

#define MAX_VARINT 10
#define MAX_DECIMAL 20
#define MAX_TEXT 16 /* so that the length of its encoding takes one byte */
#define NULL_BRANCH 0
#define VALUE_BRANCH 2 /* zig-zag 1 */
#define STEP_NUMBERS STEP_KINDS /* this step and the next `count` ones are of the same kind: see joins() */

struct program {
	struct step *steps;
	size_t count;
	size_t fixed_bytes; /* at most, without cached parts */
	size_t cached; /* number of STEP_CACHED */
	size_t head_first, head_end; /* the steps that read only a row's first MEMO_HEAD bytes */
	bool constant;
};

struct encoder {
	struct program value;
	struct program key;
	struct bytes *strings;
	uint8_t *string_data;
	size_t row_size;
	const struct step *id; /* the first STEP_CACHED, which says where the id is; or NULL */
	struct cache cache;
	struct memo memo; /* of the value's head */
};

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "rows and steps are little-endian"
#endif

static uint64_t load_at_end(const uint8_t *row, const struct step *step)
{
	uint64_t number = 0;

	memcpy(&number, row + step->offset, step->width);
	return number;
}

/* Read 8 bytes and drop those that are not the number's: cheaper than a branch by its width. */
static inline uint64_t load(const uint8_t *row, const struct step *step)
{
	uint64_t number;

	if (step->is_inside)
		memcpy(&number, row + step->offset, sizeof(number));
	else
		number = load_at_end(row, step);
	number <<= step->shift;
	return step->is_signed ? (uint64_t)((int64_t)number >> step->shift) : number >> step->shift;
}

static inline bool fits(const struct step *step, uint64_t number)
{
	if (step->is_signed)
		return (int64_t)number >= step->least && (int64_t)number <= (int64_t)step->most;
	return number <= step->most;
}

static inline bool is_null(const struct step *step, const uint8_t *row)
{
	return step->known_mask && !(row[step->known_offset] & step->known_mask);
}

static uint8_t *put_long_varint(uint8_t *out, uint64_t number)
{
	while (number >= 0x80) {
		*out++ = (uint8_t)number | 0x80;
		number >>= 7;
	}
	*out++ = (uint8_t)number;
	return out;
}

/*
 * Spreads groups of 7 bits to 8 bytes at once: lengths are hard to predict, and a branch for each byte costs more. It may
 * write 8 bytes where fewer are taken, but never beyond MAX_VARINT.
 */
static inline uint8_t *put_varint(uint8_t *out, uint64_t number)
{
	if (number >> 56)
		return put_long_varint(out, number);
	/* Bits / 7, rounded up; the multiplication is exact for these, and a division would take longer. */
	unsigned length = ((unsigned)(63 - __builtin_clzll(number | 1)) * 9 + 73) / 64;
	uint64_t more = 0x8080808080808080U & (((uint64_t)1 << 8 * (length - 1)) - 1);

	number = (number & 0x000000000fffffff) | (number & 0x00fffffff0000000) << 4;
	number = (number & 0x00003fff00003fff) | (number & 0x0fffc0000fffc000) << 2;
	number = (number & 0x007f007f007f007f) | (number & 0x3f803f803f803f80) << 1;
	number |= more;
	memcpy(out, &number, sizeof(number));
	return out + length;
}

static inline uint64_t zigzag(int64_t number)
{
	return (uint64_t)number << 1 ^ (uint64_t)(number >> 63);
}

static inline int64_t floor_divided(int64_t number, int64_t divisor)
{
	int64_t quotient = number / divisor;

	return quotient - (number % divisor < 0);
}

static inline uint8_t *put_bytes(uint8_t *out, struct bytes bytes)
{
	if (bytes.length)
		memcpy(out, bytes.data, bytes.length);
	return out + bytes.length;
}

static inline uint8_t *put_integer(uint8_t *out, const struct step *step, uint64_t raw, int64_t utc_offset)
{
	int64_t number = (int64_t)(step->utc ? raw + (uint64_t)utc_offset : raw);

	return put_varint(out, zigzag(step->divisor == 1 ? number : floor_divided(number, step->divisor)));
}

/*
 * Write a step of STEP_NUMBERS and those that it joins. Most of these numbers are below 64: one byte, which a branch
 * predicts.
 */
static inline uint8_t *put_numbers(uint8_t *out, const struct step *step, const uint8_t *row)
{
	size_t count = (size_t)step->count + 1;

	if (is_null(step, row)) {
		memset(out, NULL_BRANCH, count);
		return out + count;
	}
	for (size_t i = 0; i < count; i++) {
		uint32_t number;

		memcpy(&number, row + step[i].offset, sizeof(number));
		*out++ = VALUE_BRANCH;
		if (number < 0x40)
			*out++ = (uint8_t)(number << 1);
		else
			out = put_varint(out, (uint64_t)number << 1);
	}
	return out;
}

static uint8_t *put_key_address(uint8_t *out, const uint8_t *address)
{
	if (is_mapped(address))
		return put_address(out, address);
	*out++ = '[';
	out = put_address(out, address);
	*out++ = ']';
	return out;
}

static uint8_t *put_decimal(uint8_t *out, uint64_t number)
{
	uint8_t digits[MAX_DECIMAL], *first = digits + sizeof(digits);

	do
		*--first = (uint8_t)('0' + number % 10);
	while (number /= 10);
	return put_bytes(out, (struct bytes){ first, (size_t)(digits + sizeof(digits) - first) });
}

static uint8_t *put_text(uint8_t *out, const uint8_t *text, size_t width)
{
	static const char digits[] = "0123456789ABCDEF";

	for (size_t i = 0; i < width && text[i]; i++) {
		if (text[i] >= ' ' && text[i] <= '~' && text[i] != '%') {
			*out++ = text[i];
			continue;
		}
		*out++ = '%';
		*out++ = (uint8_t)digits[text[i] >> 4];
		*out++ = (uint8_t)digits[text[i] & 15];
	}
	return out;
}

static inline struct bytes remembered(const struct encoder *encoder, const struct step *step, const uint8_t *row)
{
	const struct cache_entry *entry = NULL;

	if (!is_null(step, row))
		entry = cache_find(&encoder->cache, load(row, step));
	return entry ? cache_part(entry, step->first) : encoder->strings[step->count];
}

/*
 * Run the steps from `first` to before `end`. Return the end of what was written, or NULL for a number that does not
 * fit, with the step in `*failed`.
 */
static uint8_t *run(const struct encoder *encoder, const struct program *program, size_t first, size_t end,
		    const uint8_t *row, int64_t utc_offset, uint8_t *out, size_t *failed)
{
	for (size_t i = first; i < end; i++) {
		const struct step *step = &program->steps[i];
		uint64_t number;

		if (step->kind == STEP_NUMBERS) {
			out = put_numbers(out, step, row);
			i += step->count;
			continue;
		}
		if (step->nullable) {
			if (is_null(step, row)) {
				*out++ = NULL_BRANCH;
				continue;
			}
			*out++ = VALUE_BRANCH;
		}
		switch (step->kind) {
		case STEP_CONSTANT:
			out = put_bytes(out, encoder->strings[step->first]);
			break;
		case STEP_INTEGER:
			number = load(row, step);
			if (!fits(step, number)) {
				*failed = i;
				return NULL;
			}
			out = put_integer(out, step, number, utc_offset);
			break;
		case STEP_BOOLEAN:
			*out++ = load(row, step) != 0;
			break;
		case STEP_NAME:
			number = load(row, step);
			number = number < step->count ? number : step->count - 1;
			out = put_bytes(out, encoder->strings[step->first + number]);
			break;
		case STEP_ADDRESS: {
			uint8_t *last = put_address(out + 1, row + step->offset);
			*out = (uint8_t)((last - out - 1) << 1); /* its length in one byte, since it is below 64 */
			out = last;
			break;
		}
		case STEP_TEXT: {
			uint8_t *last = put_text(out + 1, row + step->offset, step->width);
			*out = (uint8_t)((last - out - 1) << 1);
			out = last;
			break;
		}
		case STEP_CACHED:
			out = put_bytes(out, remembered(encoder, step, row));
			break;
		case STEP_KEY_ADDRESS:
			out = put_key_address(out, row + step->offset);
			break;
		case STEP_KEY_NUMBER:
			out = put_decimal(out, load(row, step));
			break;
		}
	}
	return out;
}

/* As run(), for all steps of the value. */
static uint8_t *run_value(const struct encoder *encoder, const uint8_t *row, int64_t utc_offset, uint8_t *out,
			  size_t *failed)
{
	const struct program *value = &encoder->value;
	uint8_t *head = run(encoder, value, 0, value->head_first, row, utc_offset, out, failed);

	if (head && value->head_first < value->head_end) {
		struct memo_entry *entry = memo_entry(&encoder->memo, row);

		if (memo_has(entry, row)) {
			head = put_bytes(head, (struct bytes){ entry->data, entry->length });
		} else {
			out = head;
			head = run(encoder, value, value->head_first, value->head_end, row, utc_offset, out, failed);
			if (head)
				memo_put(entry, row, out, (size_t)(head - out));
		}
	}
	return head ? run(encoder, value, value->head_end, value->count, row, utc_offset, head, failed) : NULL;
}

bool encoder_encode(const struct encoder *encoder, struct rows rows, int64_t utc_offset, uint8_t *out,
		    struct spans spans, size_t *written)
{
	uint8_t *at = out;
	int64_t key_start = 0, key_length = 0;
	bool all = true;
	size_t failed;

	if (encoder->key.constant) {
		at = run(encoder, &encoder->key, 0, encoder->key.count, NULL, 0, at, &failed);
		key_length = at - out;
	}
	for (size_t i = 0; i < rows.count; i++) {
		const uint8_t *row = rows.data + (ptrdiff_t)i * rows.stride;
		uint8_t *end = run_value(encoder, row, utc_offset, at, &failed);

		spans.starts[i] = at - out;
		spans.lengths[i] = end ? end - at : -1 - (int64_t)failed;
		all &= end != NULL;
		at = end ? end : at;
		if (!encoder->key.constant) {
			end = run(encoder, &encoder->key, 0, encoder->key.count, row, utc_offset, at, &failed);
			key_start = at - out;
			key_length = end - at;
			at = end;
		}
		spans.key_starts[i] = key_start;
		spans.key_lengths[i] = key_length;
	}
	*written = (size_t)(at - out);
	return all;
}

size_t encoder_missing(const struct encoder *encoder, struct rows rows, uint64_t *ids, size_t limit)
{
	size_t found = 0;

	for (size_t i = 0; encoder->id && i < rows.count && found < limit; i++) {
		const uint8_t *row = rows.data + (ptrdiff_t)i * rows.stride;

		if (is_null(encoder->id, row))
			continue;
		uint64_t id = load(row, encoder->id);
		if (cache_find(&encoder->cache, id))
			continue;
		size_t j = 0;
		while (j < found && ids[j] != id)
			j++;
		if (j == found)
			ids[found++] = id;
	}
	return found;
}

size_t encoder_bound(const struct encoder *encoder, size_t rows)
{
	size_t cached = encoder->value.cached + encoder->key.cached;
	size_t row = encoder->value.fixed_bytes + encoder->key.fixed_bytes + cached * encoder->cache.longest;
	size_t key = encoder->key.fixed_bytes;
	size_t bytes;

	if (__builtin_mul_overflow(rows, row, &bytes) || __builtin_add_overflow(bytes, key, &bytes))
		return SIZE_MAX;
	return bytes;
}

size_t encoder_row_size(const struct encoder *encoder)
{
	return encoder->row_size;
}

bool encoder_remember(struct encoder *encoder, uint64_t id, const struct bytes *parts, size_t count)
{
	memo_clear(&encoder->memo);
	return cache_put(&encoder->cache, id, parts, count);
}

void encoder_forget(struct encoder *encoder)
{
	memo_clear(&encoder->memo);
	cache_clear(&encoder->cache);
}

/* What a step writes at most, without its branch and without cached parts. */
static size_t most_bytes(const struct step *step, const struct bytes *strings)
{
	size_t most = 0;

	switch (step->kind) {
	case STEP_INTEGER:
		return MAX_VARINT;
	case STEP_BOOLEAN:
		return 1;
	case STEP_ADDRESS:
		return 1 + MAX_ADDRESS;
	case STEP_TEXT:
		return 1 + 3 * (size_t)step->width;
	case STEP_KEY_ADDRESS:
		return MAX_ADDRESS + 2;
	case STEP_KEY_NUMBER:
		return MAX_DECIMAL;
	case STEP_CACHED:
		return strings[step->count].length;
	default: /* STEP_CONSTANT, STEP_NAME */
		for (size_t i = 0; i < (step->kind == STEP_NAME ? step->count : 1); i++)
			if (strings[step->first + i].length > most)
				most = strings[step->first + i].length;
		return most;
	}
}

static bool reads_number(const struct step *step)
{
	return step->kind != STEP_CONSTANT && step->kind != STEP_ADDRESS && step->kind != STEP_KEY_ADDRESS &&
	       step->kind != STEP_TEXT;
}

static const char *check_step(const struct step *step, const struct step *id, size_t string_count, size_t row_size)
{
	bool is_address = step->kind == STEP_ADDRESS || step->kind == STEP_KEY_ADDRESS;
	uint64_t width = is_address ? 16 : step->kind == STEP_CONSTANT ? 0 : step->width;

	if (step->kind >= STEP_KINDS)
		return "a step of an unknown kind";
	if (reads_number(step) && width != 1 && width != 2 && width != 4 && width != 8)
		return "a number whose width is not 1, 2, 4 or 8 bytes";
	if (step->kind == STEP_TEXT && (!width || width > MAX_TEXT))
		return "a text that is empty or longer than 16 bytes";
	if (width && step->offset + width > row_size)
		return "a step that reads outside the row";
	if (step->known_mask && step->known_offset >= row_size)
		return "a null bit outside the row";
	if (step->kind == STEP_CONSTANT && step->first >= string_count)
		return "a constant outside the strings";
	if (step->kind == STEP_NAME &&
	    (!step->count || (uint64_t)step->first + step->count > string_count || step->is_signed))
		return "names outside the strings, or by a signed number";
	if (step->kind == STEP_INTEGER && step->divisor < 1)
		return "a divisor below 1";
	if (step->kind == STEP_CACHED) {
		if (step->first >= ENCODER_MAX_PARTS || step->count >= string_count || step->nullable)
			return "a cached part that does not exist, or has a branch of its own";
		if (id && (step->offset != id->offset || step->width != id->width || step->is_signed != id->is_signed ||
			   step->known_offset != id->known_offset || step->known_mask != id->known_mask))
			return "cached parts of two ids";
	}
	return NULL;
}

static void prepare_step(struct step *step, size_t row_size)
{
	if (reads_number(step)) {
		step->shift = (uint8_t)(64 - 8 * step->width);
		step->is_inside = step->offset + sizeof(uint64_t) <= row_size;
	}
}

/* Whether all that the step writes comes from the head of a row, constants and the cache. */
static bool reads_head(const struct step *step)
{
	size_t width = step->kind == STEP_ADDRESS ? 16 : step->kind == STEP_CONSTANT ? 0 : step->width;

	return !step->utc && (!width || step->offset + width <= MEMO_HEAD) &&
	       (!step->known_mask || step->known_offset < MEMO_HEAD);
}

/* Find the longest run of steps that read the head. */
static void find_head(struct program *program)
{
	for (size_t first = 0, end; first < program->count; first = end + 1) {
		end = first;
		while (end < program->count && reads_head(&program->steps[end]))
			end++;
		if (end - first > program->head_end - program->head_first) {
			program->head_first = first;
			program->head_end = end;
		}
	}
}

/* Whether the step is a number of 32 bits that may be null and always fits. */
static bool is_plain(const struct step *step)
{
	return step->kind == STEP_INTEGER && step->nullable && step->width == sizeof(uint32_t) && !step->is_signed &&
	       !step->utc && step->divisor == 1 && step->most >= UINT32_MAX;
}

static bool joins(const struct step *step, const struct step *next)
{
	return is_plain(next) && next->known_mask == step->known_mask && next->known_offset == step->known_offset;
}

/* Joins numbers that are null together. */
static void join_numbers(struct program *program)
{
	for (size_t i = 0, end; i < program->count; i = end) {
		struct step *step = &program->steps[i];

		end = i + 1;
		if (!is_plain(step) || (i >= program->head_first && i < program->head_end))
			continue;
		while (end < program->count && end != program->head_first && joins(step, &program->steps[end]))
			end++;
		step->kind = STEP_NUMBERS;
		step->count = (uint32_t)(end - i - 1);
	}
}

static const char *check_program(struct encoder *encoder, struct program *program, size_t string_count)
{
	program->constant = true;
	for (size_t i = 0; i < program->count; i++) {
		struct step *step = &program->steps[i];
		const char *reason = check_step(step, encoder->id, string_count, encoder->row_size);

		if (reason)
			return reason;
		prepare_step(step, encoder->row_size);
		if (step->kind == STEP_CACHED) {
			encoder->id = encoder->id ? encoder->id : step;
			program->cached++;
		}
		program->constant &= step->kind == STEP_CONSTANT && !step->known_mask;
		program->fixed_bytes += step->nullable + most_bytes(step, encoder->strings);
	}
	return NULL;
}

static const char *check(struct encoder *encoder, size_t string_count)
{
	const char *reason = check_program(encoder, &encoder->value, string_count);

	if (!reason)
		reason = check_program(encoder, &encoder->key, string_count);
	/* A key has no failed rows: a row with a bad number has none, and is not sent. */
	for (size_t i = 0; !reason && i < encoder->key.count; i++)
		if (encoder->key.steps[i].kind == STEP_INTEGER)
			reason = "an Avro integer in a key";
	if (reason)
		return reason;
	if (encoder->row_size >= MEMO_HEAD)
		find_head(&encoder->value);
	join_numbers(&encoder->value);
	return NULL;
}

static bool copy_steps(struct program *program, const struct step *steps, size_t count)
{
	program->steps = calloc(count + 1, sizeof(*steps));
	program->count = count;
	if (program->steps && count)
		memcpy(program->steps, steps, count * sizeof(*steps));
	return program->steps;
}

static bool copy_strings(struct encoder *encoder, const struct bytes *strings, size_t count)
{
	size_t total = 0;

	for (size_t i = 0; i < count; i++)
		total += strings[i].length;
	encoder->strings = calloc(count + 1, sizeof(*strings));
	encoder->string_data = malloc(total + 1);
	if (!encoder->strings || !encoder->string_data)
		return false;
	uint8_t *at = encoder->string_data;
	for (size_t i = 0; i < count; i++) {
		encoder->strings[i] = (struct bytes){ at, strings[i].length };
		at = put_bytes(at, strings[i]);
	}
	return true;
}

struct encoder *encoder_new(const struct step *value, size_t value_steps, const struct step *key, size_t key_steps,
			    const struct bytes *strings, size_t string_count, size_t row_size, const char **reason)
{
	struct encoder *encoder;

	*reason = NULL;
	if (value_steps > ENCODER_MAX_STEPS || key_steps > ENCODER_MAX_STEPS || string_count > UINT32_MAX)
		*reason = "too many steps";
	for (size_t i = 0; !*reason && i < string_count; i++)
		if (strings[i].length > ENCODER_MAX_STRING)
			*reason = "a string that is too long";
	if (*reason || !(encoder = calloc(1, sizeof(*encoder))))
		return NULL;
	encoder->row_size = row_size;
	prepare_addresses();
	if (copy_steps(&encoder->value, value, value_steps) && copy_steps(&encoder->key, key, key_steps) &&
	    copy_strings(encoder, strings, string_count) && memo_open(&encoder->memo)) {
		*reason = check(encoder, string_count);
		if (!*reason)
			return encoder;
	}
	encoder_free(encoder);
	return NULL;
}

void encoder_free(struct encoder *encoder)
{
	if (!encoder)
		return;
	cache_clear(&encoder->cache);
	free(encoder->memo.entries);
	free(encoder->value.steps);
	free(encoder->key.steps);
	free(encoder->strings);
	free(encoder->string_data);
	free(encoder);
}
