/* SPDX-License-Identifier: GPL-2.0 */
/* For bcc's helpers.h, which counts a ring's size in pages of this size. */
#define PAGE_SIZE 4096
