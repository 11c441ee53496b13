/* producer._native: the hot loops in C. producer/_native.pyi documents it. */
#include "binding.h"

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

void close_buffers(Py_buffer *views, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (views[i].obj)
			PyBuffer_Release(&views[i]);
}

static int add_all(PyObject *module)
{
	bool failed = add_kafka(module) < 0 || add_encode(module) < 0 || add_decode(module) < 0 ||
		      add_connection_table(module) < 0 || add_ring(module) < 0;

	return failed ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {
	{ Py_mod_exec, add_all },
	{ 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "producer._native",
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
	return PyModuleDef_Init(&definition);
}
