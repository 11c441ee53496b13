/* Addresses of 16 bytes as text. */
#ifndef REBPF_ADDRESS_H
#define REBPF_ADDRESS_H

#include <stdbool.h>
#include <stdint.h>

#define MAX_ADDRESS 39

/* Must be called once before put_address(). */
void prepare_addresses(void);

/* Whether it is IPv4 in IPv6: ::ffff:a.b.c.d. */
bool is_mapped(const uint8_t *address);

/*
 * Write an address in the form of RFC 5952, an IPv4-mapped one as IPv4, and return its end: MAX_ADDRESS bytes at most,
 * without a zero at the end.
 */
uint8_t *put_address(uint8_t *out, const uint8_t *address);

#endif
