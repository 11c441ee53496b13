/* barrier() for Python: orders the steps of reading a ring (producer/kernel/ringbuf.py) on every processor. */
#include "binding.h"

/*
 * Of two accesses to memory around this call, the second one is not done before the first, except that a load may pass a
 * store: all that acquire and release order. On arm64 this is an instruction; on x86-64 only the compiler must comply.
 */
static PyObject *barrier(PyObject *module, PyObject *unused)
{
	(void)module;
	(void)unused;
	__atomic_thread_fence(__ATOMIC_ACQ_REL);
	Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
	{ "barrier", barrier, METH_NOARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

int add_ring(PyObject *module)
{
	return PyModule_AddFunctions(module, functions);
}
