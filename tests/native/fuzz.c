/*
 * A small coverage-guided fuzzer: FUZZER RUNS SEED CORPUS [KEEP]. It runs the files of the folder CORPUS, then RUNS
 * mutations of them; an input that reaches new code joins the pool, and is written to the folder KEEP if there is one.
 *
 * gcc's -fsanitize-coverage=trace-pc calls back at each edge of the code under test. The function that it drives has
 * libFuzzer's interface, so clang's -fsanitize=fuzzer can take this file's place.
 */
#include <dirent.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAP_BITS 16
#define INPUT_BYTES 8192
#define MAX_POOL 4096

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
	uint8_t *data;
	size_t size;
};

static uint8_t seen[1 << MAP_BITS];
static uintptr_t last;
static size_t edges;
static bool is_new;
static struct input pool[MAX_POOL];
static size_t pool_size;
static uint64_t state;

__attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc(void)
{
	uintptr_t pc = (uintptr_t)__builtin_return_address(0);
	size_t edge = (pc ^ last << 1) * 0x9E3779B97F4A7C15ULL >> (64 - MAP_BITS);

	last = pc;
	if (!seen[edge]) {
		seen[edge] = 1;
		edges++;
		is_new = true;
	}
}

static uint64_t next(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state * 0x2545F4914F6CDD1DULL;
}

static size_t below(size_t limit)
{
	return limit ? next() % limit : 0;
}

static void add(const uint8_t *data, size_t size, const char *keep)
{
	if (pool_size == MAX_POOL)
		return;
	pool[pool_size] = (struct input){ malloc(size + 1), size };
	memcpy(pool[pool_size++].data, data, size);
	if (keep) {
		char path[PATH_MAX];
		snprintf(path, sizeof(path), "%s/%016llx", keep, (unsigned long long)next());
		FILE *file = fopen(path, "wb");
		if (file) {
			fwrite(data, 1, size, file);
			fclose(file);
		}
	}
}

/* Runs an input from memory of its exact size, so that the sanitizer sees a read beyond it. */
static bool run(const uint8_t *data, size_t size)
{
	uint8_t *exact = malloc(size ? size : 1);

	memcpy(exact, data, size);
	is_new = false;
	last = 0;
	LLVMFuzzerTestOneInput(exact, size);
	free(exact);
	return is_new;
}

static size_t mutate(uint8_t *data, size_t size)
{
	static const uint64_t edge_values[] = { 0,          1,          0x7f,       0x80,      0xff,       0xffff,
						0x7fffffff, 0x80000000, 0xffffffff, INT64_MAX, 1ULL << 63, UINT64_MAX };

	for (size_t changes = 1 + below(8); changes; changes--) {
		size_t at = below(size), length = 1 + below(64);

		switch (below(6)) {
		case 0:
			if (size)
				data[at] ^= (uint8_t)(1 << below(8));
			break;
		case 1:
			if (size)
				data[at] = (uint8_t)next();
			break;
		case 2: {
			size_t width = (size_t)1 << below(4);
			if (at + width <= size)
				memcpy(data + at, &edge_values[below(12)], width);
			break;
		}
		case 3: /* insert */
			if (size + length <= INPUT_BYTES) {
				memmove(data + at + length, data + at, size - at);
				for (size_t i = 0; i < length; i++)
					data[at + i] = (uint8_t)next();
				size += length;
			}
			break;
		case 4: /* remove */
			if (at + length < size) {
				memmove(data + at, data + at + length, size - at - length);
				size -= length;
			}
			break;
		default: { /* splice */
			struct input other = pool[below(pool_size)];
			size_t from = below(other.size), to = below(size);
			size_t count = other.size - from < INPUT_BYTES - to ? other.size - from : INPUT_BYTES - to;
			memcpy(data + to, other.data + from, count);
			size = to + count > size ? to + count : size;
		}
		}
	}
	return size;
}

static void read_corpus(const char *folder)
{
	DIR *entries = opendir(folder);
	uint8_t data[INPUT_BYTES];

	for (struct dirent *entry; entries && (entry = readdir(entries));) {
		char path[PATH_MAX];
		snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
		FILE *file = entry->d_type == DT_REG ? fopen(path, "rb") : NULL;
		if (!file)
			continue;
		size_t size = fread(data, 1, sizeof(data), file);
		fclose(file);
		run(data, size);
		add(data, size, NULL);
	}
	if (entries)
		closedir(entries);
}

int main(int count, char **arguments)
{
	uint8_t data[INPUT_BYTES];
	size_t runs = 0;

	if (count < 4)
		return 2;
	size_t most = strtoull(arguments[1], NULL, 10);
	state = strtoull(arguments[2], NULL, 10) * 2 + 1;
	read_corpus(arguments[3]);
	size_t from_corpus = pool_size;
	if (!pool_size)
		add(data, 0, NULL);
	for (; runs < most; runs++) {
		struct input from = pool[below(pool_size)];
		memcpy(data, from.data, from.size);
		size_t size = mutate(data, from.size);
		if (run(data, size))
			add(data, size, count > 4 ? arguments[4] : NULL);
	}
	printf("%zu files, %zu runs, %zu inputs, %zu edges\n", from_corpus, runs, pool_size, edges);
	for (size_t i = 0; i < pool_size; i++)
		free(pool[i].data);
	return 0;
}
