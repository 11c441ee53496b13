#include "address.h"

#include <string.h>

#define GROUPS 8

bool is_mapped(const uint8_t *address)
{
	static const uint8_t prefix[12] = { [10] = 0xff, [11] = 0xff };

	return !memcmp(address, prefix, sizeof(prefix));
}

/* Each byte in decimal with a point, and how many of the 4 characters that takes. */
static uint8_t decimals[256][4];
static uint8_t lengths[256];

void prepare_addresses(void)
{
	for (unsigned byte = 0; byte < 256; byte++) {
		uint8_t *out = decimals[byte];

		if (byte >= 100)
			*out++ = (uint8_t)('0' + byte / 100);
		if (byte >= 10)
			*out++ = (uint8_t)('0' + byte / 10 % 10);
		*out++ = (uint8_t)('0' + byte % 10);
		*out++ = '.';
		lengths[byte] = (uint8_t)(out - decimals[byte]);
	}
}

/* Copy 4 characters each time: how many digits follow is hard to predict. */
static uint8_t *put_ipv4(uint8_t *out, const uint8_t *address)
{
	for (int i = 0; i < 4; i++) {
		memcpy(out, decimals[address[i]], 4);
		out += lengths[address[i]];
	}
	return out - 1;
}

static uint8_t *put_group(uint8_t *out, unsigned group)
{
	static const char digits[] = "0123456789abcdef";

	for (int shift = 12; shift >= 0; shift -= 4)
		if (!shift || group >> shift)
			*out++ = (uint8_t)digits[group >> shift & 0xf];
	return out;
}

/* The first of the longest runs of at least two zero groups: [*first, *end), or empty. */
static void longest_zeros(const unsigned *groups, int *first, int *end)
{
	*first = *end = 0;
	for (int i = 0; i < GROUPS; i++) {
		int start = i;

		while (i < GROUPS && !groups[i])
			i++;
		if (i - start > 1 && i - start > *end - *first) {
			*first = start;
			*end = i;
		}
	}
}

uint8_t *put_address(uint8_t *out, const uint8_t *address)
{
	unsigned groups[GROUPS];
	int first, end;

	if (is_mapped(address))
		return put_ipv4(out, address + 12);
	for (int i = 0; i < GROUPS; i++)
		groups[i] = (unsigned)address[2 * i] << 8 | address[2 * i + 1];
	longest_zeros(groups, &first, &end);
	for (int i = 0; i < GROUPS; i++) {
		if (i == first && end > first) {
			*out++ = ':';
			*out++ = ':';
			i = end - 1;
			continue;
		}
		if (i && i != end)
			*out++ = ':';
		out = put_group(out, groups[i]);
	}
	return out;
}
