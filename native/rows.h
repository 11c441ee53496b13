/* Records of a ring: `count` of them, each `stride` bytes after the one before. They may hold anything. */
#ifndef REBPF_ROWS_H
#define REBPF_ROWS_H

#include <stddef.h>
#include <stdint.h>

struct rows {
	const uint8_t *data;
	size_t count;
	ptrdiff_t stride;
};

#endif
