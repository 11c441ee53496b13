/* SPDX-License-Identifier: GPL-2.0 */
/* bcc includes this before all else, and its helpers.h insists on the two options. */
#define CONFIG_BPF 1
#define CONFIG_BPF_SYSCALL 1
