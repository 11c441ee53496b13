/* SPDX-License-Identifier: GPL-2.0 */
/* For bcc's helpers.h. Ring sizes are given to it in pages of this size. */
#define PAGE_SIZE 4096
