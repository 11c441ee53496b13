/* What the files that bind C to Python share. They alone include Python.h, with the stable ABI of Python 3.11. */
#ifndef REBPF_BINDING_H
#define REBPF_BINDING_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdbool.h>

#include "rows.h"

/*
 * Open the contiguous memory of `object`, which must hold whole items of `item_size` bytes: PyBUF_SIMPLE or
 * PyBUF_WRITABLE. False with an exception set if it has none; `name` is the argument's name, for the message.
 */
bool open_buffer(PyObject *object, Py_buffer *view, int flags, size_t item_size, const char *name);

/* Open an array of rows of `row_size` bytes, which may lie apart, as those of a ring do. */
bool open_rows(PyObject *object, size_t row_size, Py_buffer *view, struct rows *rows);

/* Close those of `count` buffers that are open. */
void close_buffers(Py_buffer *views, size_t count);

extern PyMethodDef connection_functions[], decode_functions[], kafka_functions[];

/* Add the type Encoder to the module; -1 with an exception set on failure. */
int add_encode(PyObject *module);

#endif
