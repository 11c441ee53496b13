/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The layouts come from the running kernel's BTF, so nothing depends on a version. bcc's helpers.h compares this number only
 * to choose between helper ids that every kernel with ring buffers (5.8) has.
 */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 8, 0)
