/* SPDX-License-Identifier: GPL-2.0 */
/* bcc includes this file; nothing in it is needed: bcc carries a bpf.h of its own. */
