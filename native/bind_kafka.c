#include "binding.h"
#include "kafka.h"

enum {
	OUT,
	PAYLOAD,
	STARTS,
	LENGTHS,
	KEYS,
	KEY_STARTS,
	KEY_LENGTHS,
	ROWS,
	BUFFERS
};

static const struct {
	const char *name;
	int flags;
	size_t item_size;
} arguments[BUFFERS] = {
	[OUT] = { "out", PyBUF_WRITABLE, sizeof(struct kafka_message) },
	[PAYLOAD] = { "payload", PyBUF_SIMPLE, 1 },
	[STARTS] = { "starts", PyBUF_SIMPLE, sizeof(int64_t) },
	[LENGTHS] = { "lengths", PyBUF_SIMPLE, sizeof(int64_t) },
	[KEYS] = { "keys", PyBUF_SIMPLE, 1 },
	[KEY_STARTS] = { "key_starts", PyBUF_SIMPLE, sizeof(int64_t) },
	[KEY_LENGTHS] = { "key_lengths", PyBUF_SIMPLE, sizeof(int64_t) },
	[ROWS] = { "rows", PyBUF_SIMPLE, sizeof(int64_t) },
};

static struct byte_strings strings(const Py_buffer *views, int data, int starts, int lengths)
{
	Py_ssize_t bytes = views[starts].len < views[lengths].len ? views[starts].len : views[lengths].len;

	return (struct byte_strings){ views[data].buf, (size_t)views[data].len, views[starts].buf, views[lengths].buf,
				      (size_t)bytes / sizeof(int64_t) };
}

static PyObject *fill(const Py_buffer *views, uint64_t batch)
{
	struct byte_strings payloads = strings(views, PAYLOAD, STARTS, LENGTHS);
	struct byte_strings keys = strings(views, KEYS, KEY_STARTS, KEY_LENGTHS);
	size_t count = (size_t)views[OUT].len / sizeof(struct kafka_message);
	const int64_t *rows = views[ROWS].obj ? views[ROWS].buf : NULL;

	if (rows && (size_t)views[ROWS].len / sizeof(int64_t) != count)
		return PyErr_Format(PyExc_ValueError, "%zu messages for %zd rows", count,
				    views[ROWS].len / (Py_ssize_t)sizeof(int64_t));
	size_t filled = kafka_messages(views[OUT].buf, count, rows, batch, &payloads, &keys);
	if (filled < count)
		return PyErr_Format(PyExc_ValueError, "message %zu is outside its batch", filled);
	Py_RETURN_NONE;
}

/* messages(out, batch, payload, starts, lengths, keys, key_starts, key_lengths, rows) */
static PyObject *messages(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	if (count != BUFFERS + 1)
		return PyErr_Format(PyExc_TypeError, "messages() takes %d arguments, not %zd", BUFFERS + 1, count);
	uint64_t batch = PyLong_AsUnsignedLongLong(args[1]);
	if (batch == (uint64_t)-1 && PyErr_Occurred())
		return NULL;
	if (batch > KAFKA_MAX_BATCH)
		return PyErr_Format(PyExc_ValueError, "batch number %llu has more than %d bits",
				    (unsigned long long)batch, 64 - KAFKA_ROW_BITS);

	Py_buffer views[BUFFERS] = { 0 };
	PyObject *result = NULL;
	for (int i = 0; i < BUFFERS; i++) {
		PyObject *object = args[i == OUT ? 0 : i + 1];
		if (i == ROWS && object == Py_None)
			continue;
		if (!open_buffer(object, &views[i], arguments[i].flags, arguments[i].item_size, arguments[i].name))
			goto done;
	}
	result = fill(views, batch);
done:
	close_buffers(views, BUFFERS);
	return result;
}

static PyObject *runs(const Py_buffer *pointers, const Py_buffer *rows)
{
	size_t count = (size_t)pointers->len / sizeof(void *);
	struct kafka_run run = { 0 };
	PyObject *list;

	if ((size_t)rows->len / sizeof(int64_t) != count)
		return PyErr_Format(PyExc_ValueError, "rows must have one item for each of %zu pointers", count);
	list = PyList_New(0);
	while (list && kafka_next_run(pointers->buf, count, rows->buf, &run)) {
		PyObject *item = Py_BuildValue("Kinn", (unsigned long long)run.batch, (int)run.err,
					       (Py_ssize_t)run.first, (Py_ssize_t)run.end);
		if (!item || PyList_Append(list, item) < 0)
			Py_CLEAR(list);
		Py_XDECREF(item);
	}
	return list;
}

/* reports(pointers, rows) */
static PyObject *reports(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	Py_buffer views[2] = { 0 };
	PyObject *result = NULL;

	if (count != 2)
		return PyErr_Format(PyExc_TypeError, "reports() takes 2 arguments, not %zd", count);
	if (open_buffer(args[0], &views[0], PyBUF_SIMPLE, sizeof(void *), "pointers") &&
	    open_buffer(args[1], &views[1], PyBUF_WRITABLE, sizeof(int64_t), "rows"))
		result = runs(&views[0], &views[1]);
	close_buffers(views, 2);
	return result;
}

PyMethodDef kafka_functions[] = {
	{ "messages", (PyCFunction)(void (*)(void))messages, METH_FASTCALL, NULL },
	{ "reports", (PyCFunction)(void (*)(void))reports, METH_FASTCALL, NULL },
	{ NULL, NULL, 0, NULL },
};
