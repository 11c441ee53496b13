#include "binding.h"
#include "decode.h"
#include "groups.h"

#include <string.h>

#define MOST_ROWS (1u << 24)
#define MOST_TEXTS ((size_t)1 << 30) /* twice as many slots still have a number of 32 bits */

/* A bytes object of `size` zeros. */
static PyObject *zeros(size_t size)
{
	PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);

	if (bytes)
		memset(PyBytes_AsString(bytes), 0, size);
	return bytes;
}

/* The item of a list of bytes or None; false with an exception set if it is neither. */
static bool get_value(PyObject *values, Py_ssize_t at, const uint8_t **value, size_t *size)
{
	PyObject *item = PyList_GetItem(values, at);
	char *data;
	Py_ssize_t length;

	*value = NULL;
	*size = 0;
	if (item == Py_None)
		return true;
	if (!item || PyBytes_AsStringAndSize(item, &data, &length) < 0)
		return false;
	*value = (const uint8_t *)data;
	*size = (size_t)length;
	return true;
}

static Py_ssize_t row_count(PyObject *values)
{
	Py_ssize_t rows = PyList_Size(values);

	if (rows > (Py_ssize_t)MOST_ROWS) {
		PyErr_Format(PyExc_ValueError, "%zd messages are more than %u", rows, MOST_ROWS);
		return -1;
	}
	return rows;
}

/* schema_ids(values) */
static PyObject *schema_ids(PyObject *Py_UNUSED(module), PyObject *values)
{
	Py_ssize_t rows = row_count(values);
	PyObject *ids = rows < 0 ? NULL : zeros((size_t)rows * sizeof(int64_t));

	if (!ids)
		return NULL;
	int64_t *out = (int64_t *)PyBytes_AsString(ids);
	for (Py_ssize_t row = 0; row < rows; row++) {
		const uint8_t *value;
		size_t size;
		if (!get_value(values, row, &value, &size)) {
			Py_DecRef(ids);
			return NULL;
		}
		out[row] = decode_schema_id(value, size);
	}
	return ids;
}

static uint32_t table_size(size_t entries)
{
	uint32_t size = 16;

	while (size < 2 * entries)
		size *= 2;
	return size;
}

/* The distinct strings, and their hashes as a bytes object of int64; NULL with an exception set on failure. */
static PyObject *text_lists(const struct decode_strings *strings)
{
	PyObject *texts = PyList_New(strings->count), *hashes = zeros(strings->count * sizeof(uint64_t));

	for (uint32_t i = 0; texts && hashes && i < strings->count; i++) {
		const struct decode_text *text = &strings->texts[i];
		PyObject *item = PyUnicode_DecodeUTF8((const char *)text->data, text->size, NULL);
		if (!item || PyList_SetItem(texts, i, item) < 0)
			goto failed;
		memcpy(PyBytes_AsString(hashes) + i * sizeof(uint64_t), &text->hash, sizeof(uint64_t));
	}
	if (texts && hashes)
		return Py_BuildValue("(NN)", texts, hashes);
failed:
	Py_DecRef(texts);
	Py_DecRef(hashes);
	return NULL;
}

struct plan {
	const struct decode_step *steps;
	size_t count;
	size_t columns;
};

static size_t columns_of(const struct plan *plan, enum decode_type type)
{
	size_t count = 0;

	for (size_t i = 0; i < plan->count; i++)
		count += plan->steps[i].type == type && plan->steps[i].column >= 0;
	return count;
}

/* Decode all values into `columns`; false with an exception set if one is neither bytes nor None. */
static bool decode_all(PyObject *values, const struct plan *plan, struct decode_columns *columns, uint8_t *status)
{
	for (size_t row = 0; row < columns->rows; row++) {
		const uint8_t *value;
		size_t size;
		if (!get_value(values, (Py_ssize_t)row, &value, &size))
			return false;
		status[row] = (uint8_t)decode_value(plan->steps, plan->count, value, size, row, columns);
	}
	return true;
}

/* A map as a dict; NULL with an exception set on failure. Of equal keys the last one counts. */
static PyObject *dict_of(const struct decode_text *map)
{
	struct decode_pairs pairs = { map->data, map->data + map->size, 0 };
	struct decode_text key, value;
	PyObject *dict = PyDict_New();

	while (dict && decode_next_pair(&pairs, &key, &value)) {
		PyObject *name = PyUnicode_DecodeUTF8((const char *)key.data, key.size, NULL);
		PyObject *text = PyUnicode_DecodeUTF8((const char *)value.data, value.size, NULL);
		if (!name || !text || PyDict_SetItem(dict, name, text) < 0) {
			Py_DecRef(dict);
			dict = NULL;
		}
		Py_DecRef(name);
		Py_DecRef(text);
	}
	return dict;
}

/*
 * Intern the text of each map, which `canonical` makes of a dict, and set texts[i] to its index. `kept` is a list of the
 * texts, which must outlive the strings. False with an exception set on failure.
 */
static bool intern_maps(struct decode_columns *columns, PyObject *canonical, PyObject *kept, int64_t *texts)
{
	for (uint32_t i = 0; i < columns->maps.count; i++) {
		PyObject *dict = dict_of(&columns->maps.texts[i]);
		PyObject *text = dict ? PyObject_CallFunctionObjArgs(canonical, dict, NULL) : NULL;
		Py_ssize_t size = 0;
		const char *data = text ? PyUnicode_AsUTF8AndSize(text, &size) : NULL;
		bool ok = data && PyList_Append(kept, text) == 0;

		Py_DecRef(dict);
		Py_DecRef(text);
		if (!ok)
			return false;
		if (texts_intern(&columns->strings, (const uint8_t *)data, (size_t)size, true, &texts[i])) {
			PyErr_SetString(PyExc_RuntimeError, "no room for a map");
			return false;
		}
	}
	return true;
}

/* Set the cells of maps to the indexes of their texts. */
static void replace_maps(struct decode_columns *columns, const struct plan *plan, const uint8_t *status,
			 const int64_t *texts)
{
	for (size_t i = 0; i < plan->count; i++) {
		if (plan->steps[i].type != DECODE_MAP || plan->steps[i].column < 0)
			continue;
		size_t start = (size_t)plan->steps[i].column * columns->rows;
		for (size_t row = 0; row < columns->rows; row++) {
			bool has = status[row] == DECODE_OK && columns->valid[start + row];
			columns->cells[start + row] = has ? texts[columns->cells[start + row]] : 0;
		}
	}
}

static bool allocate_strings(struct decode_strings *strings, size_t capacity, uint64_t seed)
{
	uint32_t slots = table_size(capacity);

	*strings = (struct decode_strings){ .texts = PyMem_Malloc((capacity + 1) * sizeof(struct decode_text)),
					    .slots = PyMem_Calloc(slots, sizeof(uint32_t)),
					    .mask = slots - 1,
					    .capacity = (uint32_t)capacity,
					    .seed = seed };
	return strings->texts && strings->slots;
}

static void free_strings(struct decode_strings *strings)
{
	PyMem_Free(strings->texts);
	PyMem_Free(strings->slots);
}

/* Decode all values, and return the texts and their hashes; NULL with an exception set on failure. */
static PyObject *fill(PyObject *values, const struct plan *plan, struct decode_columns *columns, uint8_t *status,
		      PyObject *canonical)
{
	PyObject *kept = PyList_New(0), *lists = NULL;
	int64_t *texts = NULL;

	if (!kept || !decode_all(values, plan, columns, status))
		goto done;
	texts = PyMem_Malloc((columns->maps.count + 1) * sizeof(*texts));
	if (!texts) {
		PyErr_NoMemory();
	} else if (intern_maps(columns, canonical, kept, texts)) {
		replace_maps(columns, plan, status, texts);
		lists = text_lists(&columns->strings);
	}
done:
	PyMem_Free(texts);
	Py_DecRef(kept);
	return lists;
}

static PyObject *decode_columns(PyObject *values, size_t rows, const struct plan *plan, uint64_t seed,
				PyObject *canonical)
{
	size_t cells = rows * plan->columns, maps = rows * columns_of(plan, DECODE_MAP);
	size_t texts = rows * columns_of(plan, DECODE_STRING) + maps;

	if (texts > MOST_TEXTS)
		return PyErr_Format(PyExc_ValueError, "%zu texts are more than %zu", texts, MOST_TEXTS);
	PyObject *cell_bytes = zeros(cells * sizeof(int64_t)), *valid = zeros(cells), *status = zeros(rows);
	PyObject *strings = NULL;
	struct decode_columns columns = { .rows = rows };
	bool has_strings = allocate_strings(&columns.strings, texts, seed);

	if (!allocate_strings(&columns.maps, maps, seed) || !has_strings) {
		PyErr_NoMemory();
	} else if (cell_bytes && valid && status) {
		columns.cells = (int64_t *)PyBytes_AsString(cell_bytes);
		columns.valid = (uint8_t *)PyBytes_AsString(valid);
		strings = fill(values, plan, &columns, (uint8_t *)PyBytes_AsString(status), canonical);
	}
	free_strings(&columns.strings);
	free_strings(&columns.maps);
	if (strings)
		return Py_BuildValue("(NNNN)", cell_bytes, valid, status, strings);
	Py_DecRef(cell_bytes);
	Py_DecRef(valid);
	Py_DecRef(status);
	return NULL;
}

/* decode(values, plan, columns, seed, canonical) */
static PyObject *decode(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	Py_buffer view = { 0 };
	PyObject *result = NULL;

	if (count != 5)
		return PyErr_Format(PyExc_TypeError, "decode() takes 5 arguments, not %zd", count);
	size_t columns = PyLong_AsSize_t(args[2]);
	uint64_t seed = PyLong_AsUnsignedLongLongMask(args[3]);
	Py_ssize_t rows = PyErr_Occurred() ? -1 : row_count(args[0]);
	if (rows < 0 || !open_buffer(args[1], &view, PyBUF_SIMPLE, sizeof(struct decode_step), "plan"))
		return NULL;
	struct plan plan = { view.buf, (size_t)view.len / sizeof(struct decode_step), columns };
	if (decode_plan_valid(plan.steps, plan.count, columns))
		result = decode_columns(args[0], (size_t)rows, &plan, seed, args[4]);
	else
		PyErr_SetString(PyExc_ValueError, "the plan is not well formed");
	close_buffers(&view, 1);
	return result;
}

/* lengths(data, plan, records) */
static PyObject *lengths(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	Py_buffer views[2] = { 0 };
	PyObject *found = NULL;

	if (count != 3)
		return PyErr_Format(PyExc_TypeError, "lengths() takes 3 arguments, not %zd", count);
	size_t records = PyLong_AsSize_t(args[2]);
	if (PyErr_Occurred() || !open_buffer(args[0], &views[0], PyBUF_SIMPLE, 1, "data") ||
	    !open_buffer(args[1], &views[1], PyBUF_SIMPLE, sizeof(struct decode_step), "plan"))
		goto done;
	const struct decode_step *steps = views[1].buf;
	size_t step_count = (size_t)views[1].len / sizeof(struct decode_step);
	if (!step_count || !decode_plan_valid(steps, step_count, 0)) {
		PyErr_SetString(PyExc_ValueError, "the plan is not well formed, or has columns");
		goto done;
	}
	/* Each record has at least one byte. */
	if (records <= (size_t)views[0].len)
		found = zeros(records * sizeof(int64_t));
	if (!PyErr_Occurred() && (!found || !decode_lengths(steps, step_count, views[0].buf, (size_t)views[0].len,
							    (int64_t *)PyBytes_AsString(found), records))) {
		Py_DecRef(found);
		found = NULL;
		PyErr_SetString(PyExc_ValueError, "the data are not records of the plan");
	}
done:
	close_buffers(views, 2);
	return found;
}

#define MOST_GROUP_COLUMNS 8

static PyObject *find_groups(const int64_t *const *columns, size_t column_count, size_t rows, uint64_t seed)
{
	uint32_t size = table_size(rows);
	uint32_t *slots = PyMem_Calloc(size, sizeof(uint32_t));
	PyObject *ids = zeros(rows * sizeof(int64_t));
	int64_t *firsts = PyMem_Malloc((rows + 1) * sizeof(int64_t));
	PyObject *result = NULL;

	if (!slots || !firsts) {
		PyErr_NoMemory();
	} else if (ids) {
		size_t found = groups_find(columns, column_count, rows, seed, slots, size - 1,
					   (int64_t *)PyBytes_AsString(ids), firsts);
		result = Py_BuildValue("(Oy#)", ids, (const char *)firsts, (Py_ssize_t)(found * sizeof(int64_t)));
	}
	Py_DecRef(ids);
	PyMem_Free(slots);
	PyMem_Free(firsts);
	return result;
}

/* groups(seed, column, ...) */
static PyObject *groups(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	Py_buffer views[MOST_GROUP_COLUMNS] = { 0 };
	const int64_t *columns[MOST_GROUP_COLUMNS];
	size_t column_count = (size_t)count - 1;
	PyObject *result = NULL;

	if (count < 2 || column_count > MOST_GROUP_COLUMNS)
		return PyErr_Format(PyExc_TypeError, "groups() takes a seed and 1 to %d columns", MOST_GROUP_COLUMNS);
	uint64_t seed = PyLong_AsUnsignedLongLongMask(args[0]);
	if (PyErr_Occurred())
		return NULL;
	for (size_t i = 0; i < column_count; i++) {
		if (!open_buffer(args[i + 1], &views[i], PyBUF_SIMPLE, sizeof(int64_t), "column"))
			goto done;
		columns[i] = views[i].buf;
		if (views[i].len != views[0].len || (size_t)views[i].len > MOST_ROWS * sizeof(int64_t)) {
			PyErr_SetString(PyExc_ValueError, "the columns differ in length, or are too long");
			goto done;
		}
	}
	result = find_groups(columns, column_count, (size_t)views[0].len / sizeof(int64_t), seed);
done:
	close_buffers(views, MOST_GROUP_COLUMNS);
	return result;
}

/* mark(bits, positions) */
static PyObject *mark(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	Py_buffer views[2] = { 0 };
	PyObject *is_new = NULL;

	if (count != 2)
		return PyErr_Format(PyExc_TypeError, "mark() takes 2 arguments, not %zd", count);
	if (!open_buffer(args[0], &views[0], PyBUF_WRITABLE, 1, "bits") ||
	    !open_buffer(args[1], &views[1], PyBUF_SIMPLE, sizeof(int64_t), "positions"))
		goto done;
	size_t rows = (size_t)views[1].len / sizeof(int64_t);
	is_new = zeros(rows);
	if (is_new && groups_mark(views[0].buf, (size_t)views[0].len, views[1].buf, rows,
				  (uint8_t *)PyBytes_AsString(is_new)) < rows) {
		Py_DecRef(is_new);
		is_new = NULL;
		PyErr_SetString(PyExc_ValueError, "a position is outside the bits");
	}
done:
	close_buffers(views, 2);
	return is_new;
}

PyMethodDef decode_functions[] = {
	{ "schema_ids", schema_ids, METH_O, NULL },
	{ "decode", (PyCFunction)(void (*)(void))decode, METH_FASTCALL, NULL },
	{ "lengths", (PyCFunction)(void (*)(void))lengths, METH_FASTCALL, NULL },
	{ "groups", (PyCFunction)(void (*)(void))groups, METH_FASTCALL, NULL },
	{ "mark", (PyCFunction)(void (*)(void))mark, METH_FASTCALL, NULL },
	{ NULL, NULL, 0, NULL },
};
