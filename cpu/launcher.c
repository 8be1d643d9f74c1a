/* The launcher: one callable object per compiled kernel, called by Triton as
   (gx, gy, gz, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments).
   Arguments are packed into 8-byte slots by their kind, one letter each. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>

#define FIXED 9
#define MOST 256

typedef const char *(*Kernel)(const int32_t *grid, const uint64_t *arguments,
                              const uint64_t *extents);

typedef struct {
  PyObject_HEAD vectorcallfunc call;
  Py_ssize_t count;
  PyObject *span; /* NULL unless the kernel is checked */
  char kinds[MOST];
} Launcher;

static PyObject *data_ptr, *is_cpu;

/* Launches of one thread, to be run again as they were. What their pointers point to is kept. */
typedef struct {
  Kernel kernel;
  int32_t grid[3];
  size_t first; /* of its slots */
  int checked;
} Launched;

typedef struct {
  PyObject_HEAD size_t count, room, used, most;
  Launched *launched;
  uint64_t *slots;   /* arguments; in a checked launch, its extents after them */
  PyObject *kept;    /* list */
  unsigned long thread;
} Recording;

static Recording *recording; /* the one that is under way, borrowed */

static int grow(void **memory, size_t *room, size_t needed, size_t size) {
  if (needed <= *room)
    return 0;
  size_t larger = needed + *room / 2 + 64;
  void *moved = PyMem_Realloc(*memory, larger * size);
  if (!moved) {
    PyErr_NoMemory();
    return -1;
  }
  *memory = moved;
  *room = larger;
  return 0;
}

static int note(Kernel kernel, const int32_t *grid, Py_ssize_t count, const uint64_t *slots,
                const uint64_t *extents, PyObject *const *arguments, Py_ssize_t given) {
  Recording *self = recording;
  size_t added = (size_t)count * (extents ? 3 : 1);
  if (grow((void **)&self->launched, &self->room, self->count + 1, sizeof(Launched)) ||
      grow((void **)&self->slots, &self->most, self->used + added, 8))
    return -1;
  Launched *launched = &self->launched[self->count];
  *launched = (Launched){kernel, {grid[0], grid[1], grid[2]}, self->used, extents != NULL};
  memcpy(self->slots + self->used, slots, 8 * (size_t)count);
  if (extents)
    memcpy(self->slots + self->used + count, extents, 16 * (size_t)count);
  for (Py_ssize_t i = 0; i < given; i++)
    if (!PyLong_Check(arguments[i]) && !PyFloat_Check(arguments[i]) && arguments[i] != Py_None &&
        PyList_Append(self->kept, arguments[i]))
      return -1;
  self->used += added;
  self->count++;
  return 0;
}

static int pack_pointer(PyObject *argument, Py_ssize_t at, uint64_t *slot) {
  if (argument == Py_None) {
    *slot = 0;
    return 0;
  }
  if (PyLong_Check(argument)) {
    *slot = PyLong_AsUnsignedLongLongMask(argument);
    return PyErr_Occurred() ? -1 : 0;
  }
  PyObject *on_cpu = PyObject_GetAttr(argument, is_cpu);
  if (!on_cpu)
    PyErr_Clear();
  else {
    int yes = PyObject_IsTrue(on_cpu);
    Py_DECREF(on_cpu);
    if (!yes) {
      PyErr_Format(PyExc_ValueError,
                   "pointer argument %zd is not in host memory: the CPU backend takes CPU tensors",
                   at);
      return -1;
    }
  }
  PyObject *address = PyObject_CallMethodNoArgs(argument, data_ptr);
  if (!address)
    return -1;
  *slot = PyLong_AsUnsignedLongLongMask(address);
  Py_DECREF(address);
  return PyErr_Occurred() ? -1 : 0;
}

/* First address and end of a tensor, from the callable given to make(). */
static int pack_extent(PyObject *span, PyObject *argument, uint64_t *extent) {
  PyObject *pair = PyObject_CallOneArg(span, argument);
  if (!pair)
    return -1;
  int ok = PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2;
  for (int i = 0; ok && i < 2; i++)
    extent[i] = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(pair, i));
  Py_DECREF(pair);
  return ok && !PyErr_Occurred() ? 0 : -1;
}

static int pack_float(char kind, PyObject *argument, uint64_t *slot) {
  double value = PyFloat_AsDouble(argument);
  if (value == -1.0 && PyErr_Occurred())
    return -1;
  *slot = 0;
  if (kind == 'd')
    memcpy(slot, &value, 8);
  else if (kind == 'h') {
    char bytes[2];
    if (PyFloat_Pack2(value, bytes, 1))
      return -1;
    memcpy(slot, bytes, 2);
  } else {
    float narrow = (float)value;
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    if (kind == 'y')
      bits = narrow != narrow ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    memcpy(slot, &bits, 4);
  }
  return 0;
}

/* How many slots were filled, or -1. */
static Py_ssize_t pack(Launcher *self, PyObject *const *arguments, uint64_t *slots,
                       uint64_t *extents) {
  Py_ssize_t used = 0;
  for (Py_ssize_t i = 0; i < self->count; i++) {
    PyObject *argument = arguments[i];
    switch (self->kinds[i]) {
    case '-': /* constexpr */
      continue;
    case 'p':
      if (pack_pointer(argument, i, &slots[used]))
        return -1;
      break;
    case 'i':
      slots[used] = PyLong_AsUnsignedLongLongMask(argument);
      if (PyErr_Occurred())
        return -1;
      break;
    default:
      if (pack_float(self->kinds[i], argument, &slots[used]))
        return -1;
    }
    if (extents) {
      extents[2 * used] = 0;
      extents[2 * used + 1] = UINT64_MAX;
      if (self->kinds[i] == 'p' && pack_extent(self->span, argument, &extents[2 * used]))
        return -1;
    }
    used++;
  }
  return used;
}

static int run_hook(PyObject *hook, PyObject *metadata) {
  if (hook == Py_None)
    return 0;
  PyObject *done = PyObject_CallOneArg(hook, metadata);
  Py_XDECREF(done);
  return done ? 0 : -1;
}

/* Run a kernel, and write it down where this thread's launches are recorded. -1 on an error. */
static int execute(Kernel kernel, const int32_t *grid, Py_ssize_t used, const uint64_t *slots,
                   const uint64_t *checked, PyObject *const *arguments, Py_ssize_t given) {
  if (grid[0] <= 0 || grid[1] <= 0 || grid[2] <= 0)
    return 0;
  if (recording && recording->thread == PyThread_get_thread_ident() &&
      note(kernel, grid, used, slots, checked, arguments, given))
    return -1;
  const char *fault;
  Py_BEGIN_ALLOW_THREADS;
  fault = kernel(grid, slots, checked);
  Py_END_ALLOW_THREADS;
  if (fault)
    PyErr_SetString(PyExc_RuntimeError, fault);
  return fault ? -1 : 0;
}

static PyObject *launch(PyObject *callable, PyObject *const *args, size_t flags, PyObject *names) {
  Launcher *self = (Launcher *)callable;
  Py_ssize_t given = PyVectorcall_NARGS(flags);
  if (names || given != FIXED + self->count)
    return PyErr_Format(PyExc_TypeError, "the launcher takes %zd arguments, received %zd",
                        FIXED + self->count, given);
  uint64_t slots[MOST], extents[2 * MOST];
  int32_t grid[3];
  for (int i = 0; i < 3; i++) {
    long size = PyLong_AsLong(args[i]);
    if (size == -1 && PyErr_Occurred())
      return NULL;
    grid[i] = (int32_t)size;
  }
  uint64_t *checked = self->span ? extents : NULL;
  Py_ssize_t used = pack(self, args + FIXED, slots, checked);
  if (used < 0 || run_hook(args[7], args[6]))
    return NULL;
  Kernel kernel = (Kernel)PyLong_AsVoidPtr(args[4]);
  if ((!kernel && PyErr_Occurred()) ||
      execute(kernel, grid, used, slots, checked, args + FIXED, self->count))
    return NULL;
  if (run_hook(args[8], args[6]))
    return NULL;
  Py_RETURN_NONE;
}

static PyTypeObject LauncherType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kexaone.cpu.Launcher",
    .tp_basicsize = sizeof(Launcher),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Launcher, call),
    .tp_call = PyVectorcall_Call,
};

static PyObject *make(PyObject *module, PyObject *args) {
  const char *kinds;
  Py_ssize_t count;
  PyObject *span;
  if (!PyArg_ParseTuple(args, "s#O", &kinds, &count, &span))
    return NULL;
  if (count > MOST)
    return PyErr_Format(PyExc_ValueError, "a kernel takes at most %d arguments, received %zd", MOST,
                        count);
  Launcher *self = PyObject_New(Launcher, &LauncherType);
  if (!self)
    return NULL;
  self->call = launch;
  self->count = count;
  self->span = span == Py_None ? NULL : Py_NewRef(span);
  memcpy(self->kinds, kinds, (size_t)count);
  return (PyObject *)self;
}

#include "warm.c"

static PyObject *replay(PyObject *object, PyObject *unused) {
  Recording *self = (Recording *)object;
  if (self == recording) {
    PyErr_SetString(PyExc_RuntimeError, "the recording is still under way");
    return NULL;
  }
  const char *fault = NULL;
  Py_BEGIN_ALLOW_THREADS;
  for (size_t i = 0; i < self->count && !fault; i++) {
    const Launched *at = &self->launched[i];
    const uint64_t *slots = self->slots + at->first;
    size_t end = i + 1 < self->count ? at[1].first : self->used;
    fault = at->kernel(at->grid, slots, at->checked ? slots + (end - at->first) / 3 : NULL);
  }
  Py_END_ALLOW_THREADS;
  if (fault) {
    PyErr_SetString(PyExc_RuntimeError, fault);
    return NULL;
  }
  Py_RETURN_NONE;
}

static Py_ssize_t recorded(PyObject *self) { return (Py_ssize_t)((Recording *)self)->count; }

static void release(PyObject *object) {
  Recording *self = (Recording *)object;
  PyMem_Free(self->launched);
  PyMem_Free(self->slots);
  Py_XDECREF(self->kept);
  PyObject_Free(self);
}

static PyMethodDef replays[] = {
    {"replay", replay, METH_NOARGS, "Run the recorded launches again, in order."}, {NULL}};
static PySequenceMethods counted = {.sq_length = recorded};
static PyTypeObject RecordingType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kexaone.cpu.Recording",
    .tp_basicsize = sizeof(Recording),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_dealloc = release,
    .tp_methods = replays,
    .tp_as_sequence = &counted,
};

static PyObject *begin(PyObject *module, PyObject *unused) {
  if (recording) {
    PyErr_SetString(PyExc_RuntimeError, "launches are being recorded already");
    return NULL;
  }
  Recording *self = PyObject_New(Recording, &RecordingType);
  if (!self)
    return NULL;
  memset(&self->count, 0, sizeof(Recording) - offsetof(Recording, count));
  self->thread = PyThread_get_thread_ident();
  self->kept = PyList_New(0);
  if (!self->kept) {
    Py_DECREF(self);
    return NULL;
  }
  recording = self;
  return (PyObject *)self;
}

static PyObject *end(PyObject *module, PyObject *unused) {
  recording = NULL;
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"make", make, METH_VARARGS,
     "make(kinds, span) -> a callable that launches; span(tensor) gives (start, end) or is None"},
    {"warm", warm, METH_NOARGS, "An empty memory of one kernel's launches."},
    {"begin", begin, METH_NOARGS, "Record this thread's launches until end(); keep what it returns."},
    {"end", end, METH_NOARGS, "Stop recording."},
    {NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kexaone_cpu_launcher", NULL, -1,
                                        methods};

PyMODINIT_FUNC __attribute__((visibility("default"))) PyInit_kexaone_cpu_launcher(void) {
  data_ptr = PyUnicode_InternFromString("data_ptr");
  is_cpu = PyUnicode_InternFromString("is_cpu");
  dtype_name = PyUnicode_InternFromString("dtype");
  if (!data_ptr || !is_cpu || !dtype_name || PyType_Ready(&LauncherType) < 0 ||
      PyType_Ready(&RecordingType) < 0 || PyType_Ready(&WarmType) < 0)
    return NULL;
  return PyModule_Create(&definition);
}
