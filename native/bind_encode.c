#include "binding.h"
#include "encode.h"

#define MAX_MISSING 256

struct encoder_object {
	PyObject_HEAD struct encoder *encoder;
};

static struct encoder *encoder_of(PyObject *self)
{
	return ((struct encoder_object *)self)->encoder;
}

/* Return the bytes of a tuple's items, which stay the tuple's; NULL with an exception set. */
static struct bytes *bytes_of(PyObject *tuple, size_t *count)
{
	Py_ssize_t size = PyTuple_Size(tuple);
	struct bytes *items = size < 0 ? NULL : PyMem_Malloc(((size_t)size + 1) * sizeof(*items));

	if (!items)
		return size < 0 ? NULL : (struct bytes *)PyErr_NoMemory();
	for (Py_ssize_t i = 0; i < size; i++) {
		char *data;
		Py_ssize_t length;

		if (PyBytes_AsStringAndSize(PyTuple_GetItem(tuple, i), &data, &length) < 0) {
			PyMem_Free(items);
			return NULL;
		}
		items[i] = (struct bytes){ (const uint8_t *)data, (size_t)length };
	}
	*count = (size_t)size;
	return items;
}

static PyObject *wrap(PyTypeObject *type, struct encoder *encoder)
{
	allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	PyObject *self = allocate(type, 0);

	if (self)
		((struct encoder_object *)self)->encoder = encoder;
	else
		encoder_free(encoder);
	return self;
}

/* Encoder(steps, key_steps, strings, row_size) */
static PyObject *new_encoder(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
	const char *steps, *key_steps, *reason;
	Py_ssize_t size, key_size, row_size;
	PyObject *tuple;
	size_t count;

	if (keywords && PyDict_Size(keywords))
		return PyErr_Format(PyExc_TypeError, "Encoder() takes no keyword arguments");
	if (!PyArg_ParseTuple(args, "y#y#O!n", &steps, &size, &key_steps, &key_size, &PyTuple_Type, &tuple, &row_size))
		return NULL;
	if (size % (Py_ssize_t)sizeof(struct step) || key_size % (Py_ssize_t)sizeof(struct step) || row_size < 0)
		return PyErr_Format(PyExc_ValueError, "a step has %zu bytes", sizeof(struct step));
	struct bytes *strings = bytes_of(tuple, &count);
	if (!strings)
		return NULL;
	struct encoder *encoder =
		encoder_new((const void *)steps, (size_t)size / sizeof(struct step), (const void *)key_steps,
			    (size_t)key_size / sizeof(struct step), strings, count, (size_t)row_size, &reason);
	PyMem_Free(strings);
	if (encoder)
		return wrap(type, encoder);
	return reason ? PyErr_Format(PyExc_ValueError, "the program has %s", reason) : PyErr_NoMemory();
}

static void free_encoder(PyObject *self)
{
	PyTypeObject *type = Py_TYPE(self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	encoder_free(encoder_of(self));
	release(self);
	Py_DECREF(type);
}

/* bound(rows) */
static PyObject *bound(PyObject *self, PyObject *argument)
{
	size_t rows = PyLong_AsSize_t(argument);

	if (rows == (size_t)-1 && PyErr_Occurred())
		return NULL;
	return PyLong_FromSize_t(encoder_bound(encoder_of(self), rows));
}

/* missing(rows) */
static PyObject *missing(PyObject *self, PyObject *argument)
{
	uint64_t ids[MAX_MISSING];
	struct rows rows;
	Py_buffer view;

	if (!open_rows(argument, encoder_row_size(encoder_of(self)), &view, &rows))
		return NULL;
	size_t count = encoder_missing(encoder_of(self), rows, ids, MAX_MISSING);
	PyBuffer_Release(&view);
	if (!count)
		Py_RETURN_NONE;
	PyObject *list = PyList_New((Py_ssize_t)count);
	for (size_t i = 0; list && i < count; i++) {
		PyObject *id = PyLong_FromUnsignedLongLong(ids[i]);

		if (!id || PyList_SetItem(list, (Py_ssize_t)i, id) < 0)
			Py_CLEAR(list);
	}
	return list;
}

/* remember(id, parts) */
static PyObject *remember(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
	size_t parts_count;

	if (count != 2)
		return PyErr_Format(PyExc_TypeError, "remember() takes 2 arguments, not %zd", count);
	uint64_t id = PyLong_AsUnsignedLongLong(args[0]);
	if (id == (uint64_t)-1 && PyErr_Occurred())
		return NULL;
	struct bytes *parts = bytes_of(args[1], &parts_count);
	if (!parts)
		return NULL;
	if (parts_count > ENCODER_MAX_PARTS) {
		PyMem_Free(parts);
		return PyErr_Format(PyExc_ValueError, "%zu parts, but at most %d", parts_count, ENCODER_MAX_PARTS);
	}
	bool done = encoder_remember(encoder_of(self), id, parts, parts_count);
	PyMem_Free(parts);
	if (!done)
		return PyErr_NoMemory();
	Py_RETURN_NONE;
}

/* forget() */
static PyObject *forget(PyObject *self, PyObject *Py_UNUSED(unused))
{
	encoder_forget(encoder_of(self));
	Py_RETURN_NONE;
}

static PyObject *encode_into(PyObject *self, struct rows rows, int64_t utc_offset, const Py_buffer *out,
			     const Py_buffer *spans)
{
	if ((size_t)out->len < encoder_bound(encoder_of(self), rows.count))
		return PyErr_Format(PyExc_ValueError, "%zd bytes for %zu rows, but they may need %zu", out->len,
				    rows.count, encoder_bound(encoder_of(self), rows.count));
	if ((size_t)spans->len != 4 * rows.count * sizeof(int64_t))
		return PyErr_Format(PyExc_ValueError, "spans: %zd bytes for %zu rows", spans->len, rows.count);
	int64_t *first = spans->buf;
	struct spans places = { first, first + rows.count, first + 2 * rows.count, first + 3 * rows.count };
	size_t written;
	if (!encoder_encode(encoder_of(self), rows, utc_offset, out->buf, places, &written))
		Py_RETURN_NONE;
	return PyLong_FromSize_t(written);
}

/* encode(rows, utc_offset, out, spans) */
static PyObject *encode(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
	Py_buffer view, views[2] = { 0 };
	PyObject *result = NULL;
	struct rows rows;

	if (count != 4)
		return PyErr_Format(PyExc_TypeError, "encode() takes 4 arguments, not %zd", count);
	int64_t utc_offset = PyLong_AsLongLong(args[1]);
	if (utc_offset == -1 && PyErr_Occurred())
		return NULL;
	if (!open_rows(args[0], encoder_row_size(encoder_of(self)), &view, &rows))
		return NULL;
	if (open_buffer(args[2], &views[0], PyBUF_WRITABLE, 1, "out") &&
	    open_buffer(args[3], &views[1], PyBUF_WRITABLE, sizeof(int64_t), "spans"))
		result = encode_into(self, rows, utc_offset, &views[0], &views[1]);
	close_buffers(views, 2);
	PyBuffer_Release(&view);
	return result;
}

static PyMethodDef methods[] = {
	{ "bound", bound, METH_O, NULL },
	{ "missing", missing, METH_O, NULL },
	{ "remember", (PyCFunction)(void (*)(void))remember, METH_FASTCALL, NULL },
	{ "forget", forget, METH_NOARGS, NULL },
	{ "encode", (PyCFunction)(void (*)(void))encode, METH_FASTCALL, NULL },
	{ NULL, NULL, 0, NULL },
};

static PyType_Slot type_slots[] = {
	{ Py_tp_new, new_encoder },
	{ Py_tp_dealloc, free_encoder },
	{ Py_tp_methods, methods },
	{ 0, NULL },
};

static PyType_Spec specification = {
	.name = "producer._native.Encoder",
	.basicsize = sizeof(struct encoder_object),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = type_slots,
};

int add_encode(PyObject *module)
{
	PyObject *type = PyType_FromSpec(&specification);
	int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;

	if (!failed)
		failed = PyModule_AddIntConstant(module, "MAX_IDS", ENCODER_MAX_ENTRIES);

	Py_XDECREF(type);
	return failed;
}
