/* Plans and messages from the fuzzer's bytes: valid ones stay as they are (tests/native/decode_seeds.py). */
#include <stdlib.h>
#include <string.h>

#include "connections.h"
#include "decode.h"
#include "groups.h"
#include "input.h"

#define MAX_STEPS 128
#define MAX_COLUMNS 128
#define MAX_ROWS 32
#define MAX_MESSAGE 8192

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static size_t take_number(size_t limit)
{
	uint16_t number;

	take(&number, sizeof(number));
	return number % (limit + 1);
}

static uint32_t table_size(size_t entries)
{
	uint32_t size = 16;

	while (size < 2 * entries)
		size *= 2;
	return size;
}

struct message {
	uint8_t *data; /* NULL: no value */
	size_t size;
};

/* The pairs of a map take all of its bytes but the last, which ends it. */
static void check_map(const struct decode_text *map)
{
	struct decode_pairs pairs = { map->data, map->data + map->size, 0 };
	struct decode_text key, value;
	size_t count = 0;

	while (decode_next_pair(&pairs, &key, &value)) {
		check(key.data >= map->data && key.data + key.size <= value.data);
		check(value.data + value.size < map->data + map->size);
		count++;
	}
	check(count <= DECODE_MOST_PAIRS);
}

static void check_cells(const struct decode_columns *columns, const struct decode_step *step, size_t row)
{
	size_t at = (size_t)step->column * columns->rows + row;

	check(columns->valid[at] <= 1);
	if (!columns->valid[at])
		return;
	if (step->type == DECODE_STRING)
		check(columns->cells[at] >= 0 && columns->cells[at] < columns->strings.count);
	if (step->type == DECODE_MAP) {
		check(columns->cells[at] >= 0 && columns->cells[at] < columns->maps.count);
		check_map(&columns->maps.texts[columns->cells[at]]);
	}
	if (step->type == DECODE_INT)
		check(columns->cells[at] >= INT32_MIN && columns->cells[at] <= INT32_MAX);
	if (step->type == DECODE_BOOLEAN)
		check(columns->cells[at] == 0 || columns->cells[at] == 1);
}

static void check_texts(const struct decode_strings *strings, const struct message *messages, size_t rows, size_t most)
{
	for (uint32_t i = 0; i < strings->count; i++) {
		const struct decode_text *text = &strings->texts[i];
		bool inside = false;

		for (size_t row = 0; row < rows; row++)
			inside |= messages[row].data && text->data >= messages[row].data &&
				  text->data + text->size <= messages[row].data + messages[row].size;
		check(inside && text->size <= most);
		for (uint32_t j = 0; j < i; j++)
			check(strings->texts[j].size != text->size ||
			      memcmp(strings->texts[j].data, text->data, text->size) != 0);
	}
}

/* Group the rows by two columns and mark them, as the readers do. */
static void group(const struct decode_columns *columns, size_t column_count, uint64_t seed)
{
	uint32_t slots[4 * MAX_ROWS] = { 0 };
	int64_t ids[MAX_ROWS], firsts[MAX_ROWS];
	uint8_t bits[64] = { 0 }, is_new[MAX_ROWS];
	const int64_t *pair[] = { columns->cells, columns->cells + (column_count - 1) * columns->rows };
	size_t found = groups_find(pair, 2, columns->rows, seed, slots, 4 * MAX_ROWS - 1, ids, firsts);

	check(found <= columns->rows);
	for (size_t row = 0; row < columns->rows; row++) {
		size_t first = (size_t)firsts[ids[row]];
		check(ids[row] >= 0 && (size_t)ids[row] < found && first <= row);
		check(pair[0][first] == pair[0][row] && pair[1][first] == pair[1][row]);
	}
	if (groups_mark(bits, sizeof(bits), pair[0], columns->rows, is_new) == columns->rows)
		groups_mark(bits, sizeof(bits), ids, columns->rows, is_new);
}

#define COUNTERS 3
#define MOST_CONNECTIONS 8

/* Take the columns' cells as records of connections, twice. */
static void connect(const struct decode_columns *columns, size_t column_count, uint64_t seed)
{
	static const uint8_t kinds[COUNTERS] = { COUNTER_NARROW, COUNTER_WIDE, COUNTER_RESTARTS };
	const size_t words = RESULT_WORDS + COUNTERS;
	uint64_t slots[2 * MOST_CONNECTIONS] = { 0 };
	int64_t *entries = malloc(MOST_CONNECTIONS * (ENTRY_WORDS + COUNTERS) * sizeof(int64_t));
	size_t count = columns->rows * column_count / (RECORD_WORDS + COUNTERS);
	int64_t *results = malloc((count * words + 1) * sizeof(int64_t));
	struct connections table = {
		.slots = slots,
		.mask = 2 * MOST_CONNECTIONS - 1,
		.entries = entries,
		.most = MOST_CONNECTIONS,
		.kinds = kinds,
		.counters = COUNTERS,
		.floor_ns = (int64_t)(seed >> 32),
		.seed = seed,
	};

	for (size_t round = 0; round < 2; round++) {
		connections_add(&table, columns->cells, count, results);
		for (size_t i = 0; i < count; i++) {
			check(results[i * words] >= -1 && results[i * words] < (int64_t)table.count);
			for (size_t j = RESULT_ELAPSED_NS; j < words; j++)
				check(results[i * words + j] >= 0);
		}
	}
	check(table.count <= MOST_CONNECTIONS);
	memset(slots, 0, sizeof(slots));
	connections_index(&table);
	free(entries);
	free(results);
}

static struct decode_strings strings_for(size_t capacity, uint64_t seed)
{
	uint32_t slots = table_size(capacity);

	return (struct decode_strings){ .texts = malloc((capacity + 1) * sizeof(struct decode_text)),
					.slots = calloc(slots, sizeof(uint32_t)),
					.mask = slots - 1,
					.capacity = (uint32_t)capacity,
					.seed = seed };
}

static void decode(const struct decode_step *steps, size_t count, size_t column_count, const struct message *messages,
		   size_t rows, uint64_t seed)
{
	struct decode_columns columns = {
		.cells = calloc(rows * column_count + 1, sizeof(int64_t)),
		.valid = calloc(rows * column_count + 1, 1),
		.rows = rows,
		.strings = strings_for(rows * count, seed),
		.maps = strings_for(rows * count, seed),
	};

	for (size_t row = 0; row < rows; row++) {
		decode_schema_id(messages[row].data, messages[row].size);
		if (decode_value(steps, count, messages[row].data, messages[row].size, row, &columns) != DECODE_OK)
			continue;
		for (size_t at = 0; at < count; at++)
			if (steps[at].column >= 0)
				check_cells(&columns, &steps[at], row);
	}
	check_texts(&columns.strings, messages, rows, 4 * DECODE_MOST_CHARACTERS);
	check_texts(&columns.maps, messages, rows, MAX_MESSAGE);
	if (rows && column_count) {
		group(&columns, column_count, seed);
		connect(&columns, column_count, seed);
	}
	free(columns.cells);
	free(columns.valid);
	free(columns.strings.texts);
	free(columns.strings.slots);
	free(columns.maps.texts);
	free(columns.maps.slots);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct message messages[MAX_ROWS] = { 0 };
	uint64_t seed;

	bytes = data;
	left = size;
	size_t count = take_number(MAX_STEPS), column_count = take_number(MAX_COLUMNS), rows = take_number(MAX_ROWS);
	take(&seed, sizeof(seed));
	struct decode_step *steps = malloc((count + 1) * sizeof(*steps));
	take(steps, count * sizeof(*steps));
	for (size_t row = 0; row < rows; row++) {
		size_t length = take_number(MAX_MESSAGE);
		if (!length)
			continue;
		messages[row] = (struct message){ malloc(length), length };
		take(messages[row].data, length);
	}
	if (decode_plan_valid(steps, count, column_count))
		decode(steps, count, column_count, messages, rows, seed);
	for (size_t row = 0; row < rows; row++)
		free(messages[row].data);
	free(steps);
	return 0;
}
