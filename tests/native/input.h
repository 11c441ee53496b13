/* The fuzzer's input, taken piece by piece, and the check that a property holds. */
#ifndef REBPF_TESTS_INPUT_H
#define REBPF_TESTS_INPUT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static const uint8_t *bytes;
static size_t left;

/* Takes bytes from the input; zeros follow its end. */
static void take(void *out, size_t count)
{
	size_t given = count < left ? count : left;

	memset(out, 0, count);
	if (given)
		memcpy(out, bytes, given);
	bytes += given;
	left -= given;
}

static void check(bool holds)
{
	if (!holds)
		abort();
}

#endif
