/* producer._native: the hot loops in C. producer/_native.pyi documents it. */
#include "binding.h"

#include <string.h>

bool open_buffer(PyObject *object, Py_buffer *view, int flags, size_t item_size, const char *name)
{
	if (PyObject_GetBuffer(object, view, flags) < 0)
		return false;
	if ((size_t)view->len % item_size == 0)
		return true;
	PyErr_Format(PyExc_ValueError, "%s: %zd bytes are no whole number of items of %zu bytes", name, view->len,
		     item_size);
	PyBuffer_Release(view);
	return false;
}

bool open_rows(PyObject *object, size_t row_size, Py_buffer *view, struct rows *rows)
{
	if (PyObject_GetBuffer(object, view, PyBUF_STRIDED_RO) < 0)
		return false;
	if (view->ndim != 1 || !view->shape || (size_t)view->itemsize != row_size) {
		PyErr_Format(PyExc_ValueError, "rows: one dimension of %zu bytes expected, not %d of %zd", row_size,
			     view->ndim, view->itemsize);
		PyBuffer_Release(view);
		return false;
	}
	/* ctypes leaves out the strides of a contiguous array. */
	*rows = (struct rows){ view->buf, (size_t)view->shape[0], view->strides ? view->strides[0] : view->itemsize };
	return true;
}

void close_buffers(Py_buffer *views, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (views[i].obj)
			PyBuffer_Release(&views[i]);
}

/*
 * Of two accesses to memory around this call, the second one is not done before the first, except that a load may pass a
 * store: all that acquire and release order. On arm64 this is an instruction; on x86-64 only the compiler must comply.
 */
static PyObject *barrier(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
	__atomic_thread_fence(__ATOMIC_ACQ_REL);
	Py_RETURN_NONE;
}

/* finished(data, offset, stride, size, count) */
static PyObject *finished(PyObject *Py_UNUSED(module), PyObject *arguments)
{
	PyObject *object;
	Py_ssize_t offset, stride, count;
	unsigned int size;
	Py_buffer data;

	if (!PyArg_ParseTuple(arguments, "OnnIn", &object, &offset, &stride, &size, &count) ||
	    PyObject_GetBuffer(object, &data, PyBUF_SIMPLE) < 0)
		return NULL;
	Py_ssize_t last = data.len - (Py_ssize_t)sizeof(uint32_t);
	Py_ssize_t number = 0;
	if (offset < 0 || stride <= 0 || count < 0 ||
	    (count && (offset > last || count - 1 > (last - offset) / stride))) {
		PyErr_SetString(PyExc_ValueError, "records are outside the data");
		number = -1;
	} else {
		for (const char *record = (const char *)data.buf + offset; number < count; number++, record += stride) {
			uint32_t length;
			memcpy(&length, record, sizeof(length)); /* a damaged ring's records may lie at odd addresses */
			if (length != size)
				break;
		}
		__atomic_thread_fence(__ATOMIC_ACQ_REL);
	}
	PyBuffer_Release(&data);
	return number < 0 ? NULL : PyLong_FromSsize_t(number);
}

static PyMethodDef functions[] = {
	{ "barrier", barrier, METH_NOARGS, NULL },
	{ "finished", finished, METH_VARARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static int add_all(PyObject *module)
{
	bool failed = PyModule_AddFunctions(module, connection_functions) < 0 ||
		      PyModule_AddFunctions(module, decode_functions) < 0 ||
		      PyModule_AddFunctions(module, kafka_functions) < 0 || add_encode(module) < 0;

	return failed ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {
	{ Py_mod_exec, add_all },
	{ 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "producer._native",
	.m_methods = functions,
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
	return PyModuleDef_Init(&definition);
}
