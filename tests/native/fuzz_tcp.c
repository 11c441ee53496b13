/* Records of connections from the fuzzer's bytes: valid ones stay as they are (tests/native/tcp_seeds.py). */
#include <stdlib.h>
#include <string.h>

#include "input.h"
#include "tcp_counts.h"

#define MAX_ROWS 24
#define MOST_CONNECTIONS 4
#define SLOTS (2 * MOST_CONNECTIONS)
#define WORDS (sizeof(struct tcp_counts) / sizeof(int64_t))

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const int64_t srtt_bounds_us[TCP_SRTT_BOUNDS] = { 50, 100, 1000, 1 << 20, INT64_MAX };
static uint8_t errors[TCP_ERROR_NUMBERS];

static void check_counts(const struct tcp_counts *counts, size_t rows)
{
	int64_t words[WORDS], opened = 0, failed = counts->given_up, observed = 0;

	memcpy(words, counts, sizeof(words));
	for (size_t i = 0; i < WORDS; i++)
		check(words[i] >= 0);
	for (size_t i = 0; i <= ROLE_SERVER; i++)
		opened += counts->opened[i];
	for (size_t i = 0; i < PHASES; i++)
		for (size_t j = 0; j < TCP_ERRORS; j++)
			failed += counts->failed[i][j];
	for (size_t i = 0; i <= TCP_SRTT_BOUNDS; i++)
		observed += counts->srtt[i];
	check((size_t)opened <= rows && (size_t)observed <= rows && (size_t)counts->closed <= rows);
	check(failed <= counts->closed);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const uint8_t kinds[TCP_COUNTERS] = { 0 };
	int64_t entries[MOST_CONNECTIONS * (ENTRY_WORDS + TCP_COUNTERS)];
	const struct tcp_groups groups = { errors, srtt_bounds_us };
	uint64_t slots[SLOTS] = { 0 };
	struct tcp_counts counts = { 0 };
	struct { /* before the rows */
		uint64_t seed;
		int64_t floor_ns;
		uint8_t count, gap;
	} head;

	bytes = data;
	left = size;
	for (size_t i = 0; i < TCP_ERROR_NUMBERS; i++)
		errors[i] = i % TCP_ERRORS;
	take(&head.seed, sizeof(head.seed));
	take(&head.floor_ns, sizeof(head.floor_ns));
	take(&head.count, 1);
	take(&head.gap, 1);
	struct connections table = {
		.slots = slots,
		.mask = SLOTS - 1,
		.entries = entries,
		.most = MOST_CONNECTIONS,
		.kinds = kinds,
		.counters = TCP_COUNTERS,
		.floor_ns = head.floor_ns,
		.seed = head.seed,
	};
	size_t count = head.count % (MAX_ROWS + 1), stride = sizeof(struct flow_event) + head.gap;
	/* Of the exact size, and not aligned. */
	size_t length = count ? (count - 1) * stride + sizeof(struct flow_event) : 0;
	uint8_t *block = malloc(length + 1);
	take(block + 1, length);
	struct rows rows = { block + 1, count, (ptrdiff_t)stride };
	for (size_t round = 1; round <= 2; round++) {
		tcp_count_flows(&table, rows, &groups, &counts);
		check_counts(&counts, round * count);
	}
	check(table.count <= MOST_CONNECTIONS);
	free(block);
	return 0;
}
