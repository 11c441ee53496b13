#include "binding.h"
#include "connections.h"
#include "tcp_counts.h"

#include <string.h>

enum {
	SLOTS,
	ENTRIES,
	KINDS,
	BUFFERS,
	FLOW_ROWS = BUFFERS,
	ERRORS,
	SRTT_BOUNDS,
	COUNTS,
	FLOW_BUFFERS
};

/* Open a table's buffers, and check that they fit; false with an exception set if not. */
static bool open_table(PyObject *const *args, Py_buffer *views, struct connections *table)
{
	if (!open_buffer(args[0], &views[SLOTS], PyBUF_WRITABLE, sizeof(uint64_t), "slots") ||
	    !open_buffer(args[1], &views[ENTRIES], PyBUF_WRITABLE, sizeof(int64_t), "entries") ||
	    !open_buffer(args[2], &views[KINDS], PyBUF_SIMPLE, 1, "kinds"))
		return false;
	size_t slots = (size_t)views[SLOTS].len / sizeof(uint64_t), counters = (size_t)views[KINDS].len;
	size_t words = ENTRY_WORDS + counters;
	*table = (struct connections){
		.slots = views[SLOTS].buf,
		.mask = (uint32_t)slots - 1,
		.entries = views[ENTRIES].buf,
		.count = PyLong_AsSize_t(args[3]),
		.most = (size_t)views[ENTRIES].len / sizeof(int64_t) / words,
		.kinds = views[KINDS].buf,
		.counters = counters,
		.floor_ns = PyLong_AsLongLong(args[4]),
		.seed = PyLong_AsUnsignedLongLongMask(args[5]),
	};
	if (PyErr_Occurred())
		return false;
	if (counters <= CONNECTION_MOST_COUNTERS && table->count <= table->most && table->most < UINT32_MAX / 2 &&
	    slots && !(slots & (slots - 1)) && slots / 2 >= table->most)
		return true;
	PyErr_SetString(PyExc_ValueError, "the table's sizes do not fit each other");
	return false;
}

/* index_connections(slots, entries, kinds, count, floor_ns, seed) */
static PyObject *index_connections(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	Py_buffer views[BUFFERS] = { 0 };
	struct connections table;
	PyObject *result = NULL;

	if (count != 6)
		return PyErr_Format(PyExc_TypeError, "index_connections() takes 6 arguments, not %zd", count);
	if (open_table(args, views, &table)) {
		memset(table.slots, 0, (size_t)views[SLOTS].len);
		connections_index(&table);
		result = PyBool_FromLong(1);
	}
	close_buffers(views, BUFFERS);
	return result;
}

/* add_connections(slots, entries, kinds, count, floor_ns, seed, records, results) */
static PyObject *add_connections(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	Py_buffer views[BUFFERS + 2] = { 0 };
	struct connections table;
	PyObject *result = NULL;

	if (count != 8)
		return PyErr_Format(PyExc_TypeError, "add_connections() takes 8 arguments, not %zd", count);
	if (!open_table(args, views, &table))
		goto done;
	size_t record_bytes = (RECORD_WORDS + table.counters) * sizeof(int64_t);
	size_t result_bytes = (RESULT_WORDS + table.counters) * sizeof(int64_t);
	if (!open_buffer(args[6], &views[BUFFERS], PyBUF_SIMPLE, record_bytes, "records") ||
	    !open_buffer(args[7], &views[BUFFERS + 1], PyBUF_WRITABLE, result_bytes, "results"))
		goto done;
	size_t rows = (size_t)views[BUFFERS].len / record_bytes;
	if ((size_t)views[BUFFERS + 1].len / result_bytes != rows) {
		PyErr_SetString(PyExc_ValueError, "there are not as many results as records");
		goto done;
	}
	connections_add(&table, views[BUFFERS].buf, rows, views[BUFFERS + 1].buf);
	result = PyLong_FromSize_t(table.count);
done:
	close_buffers(views, BUFFERS + 2);
	return result;
}

static bool check_flow_buffers(const struct connections *table, const Py_buffer *views)
{
	const uint8_t *errors = views[ERRORS].buf;

	if (table->counters != TCP_COUNTERS || views[ERRORS].len != TCP_ERROR_NUMBERS ||
	    views[SRTT_BOUNDS].len != TCP_SRTT_BOUNDS * sizeof(int64_t) ||
	    views[COUNTS].len != sizeof(struct tcp_counts)) {
		PyErr_SetString(PyExc_ValueError, "counters, errors, bounds or counts of another size");
		return false;
	}
	for (size_t i = 0; i < TCP_ERROR_NUMBERS; i++)
		if (errors[i] >= TCP_ERRORS) {
			PyErr_Format(PyExc_ValueError, "error %zu has an index above %d", i, TCP_ERRORS - 1);
			return false;
		}
	return true;
}

/* count_flows(slots, entries, kinds, count, floor_ns, seed, rows, errors, srtt_bounds_us, counts) */
static PyObject *count_flows(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	Py_buffer views[FLOW_BUFFERS] = { 0 };
	struct connections table;
	PyObject *result = NULL;
	struct rows rows;

	if (count != 10)
		return PyErr_Format(PyExc_TypeError, "count_flows() takes 10 arguments, not %zd", count);
	if (open_table(args, views, &table) &&
	    open_rows(args[6], sizeof(struct flow_event), &views[FLOW_ROWS], &rows) &&
	    open_buffer(args[7], &views[ERRORS], PyBUF_SIMPLE, 1, "errors") &&
	    open_buffer(args[8], &views[SRTT_BOUNDS], PyBUF_SIMPLE, sizeof(int64_t), "srtt_bounds_us") &&
	    open_buffer(args[9], &views[COUNTS], PyBUF_WRITABLE, sizeof(int64_t), "counts") &&
	    check_flow_buffers(&table, views)) {
		struct tcp_groups groups = { views[ERRORS].buf, views[SRTT_BOUNDS].buf };

		tcp_count_flows(&table, rows, &groups, views[COUNTS].buf);
		result = PyLong_FromSize_t(table.count);
	}
	close_buffers(views, FLOW_BUFFERS);
	return result;
}

PyMethodDef connection_functions[] = {
	{ "index_connections", (PyCFunction)(void (*)(void))index_connections, METH_FASTCALL, NULL },
	{ "add_connections", (PyCFunction)(void (*)(void))add_connections, METH_FASTCALL, NULL },
	{ "count_flows", (PyCFunction)(void (*)(void))count_flows, METH_FASTCALL, NULL },
	{ NULL, NULL, 0, NULL },
};
