/* Warm launches: a call whose arguments specialise as those of an earlier one runs its kernel at
   once, without Triton's binder, key and cache. Included by launcher.c. */

/* What an argument must be like, by the rule's letter:
   'e' equal to `value`; 't' a tensor of dtype `value`, aligned as `feature` says; 'i' an integer of
   the same specialisation; 'r' an integer of the same range; 'f' a float. All: of the same type. */
typedef struct {
  char rule;
  uint8_t feature;
  PyTypeObject *type;
  PyObject *value;
} Guard;

typedef struct {
  Kernel kernel;
  PyObject *compiled, *names;
  Launcher *launcher;
  Py_ssize_t given, named;
  Guard guards[MOST];
  uint8_t source[MOST]; /* argument that fills each slot */
} Variant;

typedef struct {
  PyObject_HEAD vectorcallfunc call;
  size_t count, room;
  Variant **variants;
} Warm;

static PyObject *dtype_name;

enum { ONE = 1, MULTIPLE = 2, NARROW = 4, WIDE = 8 };

static int feature_of_integer(PyObject *argument) {
  int overflow;
  long long value = PyLong_AsLongLongAndOverflow(argument, &overflow);
  if (overflow)
    return WIDE;
  return (value == 1 ? ONE : 0) | (value % 16 == 0 ? MULTIPLE : 0) |
         (value == (int32_t)value ? NARROW : 0);
}

/* 1 if the argument satisfies the guard, 0 if not, -1 on an error. A tensor's address goes to slot. */
static int satisfies(const Guard *guard, PyObject *argument, uint64_t *slot) {
  if (Py_TYPE(argument) != guard->type)
    return 0;
  switch (guard->rule) {
  case 'e':
    return argument == guard->value ? 1 : PyObject_RichCompareBool(argument, guard->value, Py_EQ);
  case 'i':
    return feature_of_integer(argument) == guard->feature;
  case 'r':
    return (feature_of_integer(argument) & (NARROW | WIDE)) == (guard->feature & (NARROW | WIDE));
  case 'f':
    return 1;
  }
  PyObject *dtype = PyObject_GetAttr(argument, dtype_name);
  Py_XDECREF(dtype); /* dtypes live as long as PyTorch */
  if (dtype != guard->value)
    return dtype ? 0 : -1;
  PyObject *on_cpu = PyObject_GetAttr(argument, is_cpu);
  Py_XDECREF(on_cpu);
  if (on_cpu != Py_True)
    return on_cpu ? 0 : -1;
  PyObject *address = PyObject_CallMethodNoArgs(argument, data_ptr);
  if (!address)
    return -1;
  *slot = PyLong_AsUnsignedLongLongMask(address);
  Py_DECREF(address);
  if (PyErr_Occurred())
    return -1;
  return (*slot % 16 == 0) == guard->feature;
}

/* 1 if the arguments are like the variant's, 0 if not, -1 on an error. */
static int matches(const Variant *self, PyObject *const *flat, PyObject *names,
                   uint64_t *addresses) {
  if (PyTuple_GET_SIZE(names) != self->named)
    return 0;
  for (Py_ssize_t i = 0; i < self->named; i++)
    if (PyTuple_GET_ITEM(names, i) != PyTuple_GET_ITEM(self->names, i))
      return 0;
  /* by name come the constants, which tell variants apart */
  for (Py_ssize_t i = self->given + self->named - 1; i >= 0; i--) {
    int yes = satisfies(&self->guards[i], flat[i], &addresses[i]);
    if (yes <= 0)
      return yes;
  }
  return 1;
}

static int run_variant(const Variant *self, const int32_t *grid, PyObject *const *flat,
                       const uint64_t *addresses) {
  uint64_t slots[MOST];
  PyObject *tensors[MOST];
  Py_ssize_t used = 0, pointers = 0;
  for (Py_ssize_t i = 0; i < self->launcher->count; i++) {
    char kind = self->launcher->kinds[i];
    if (kind == '-')
      continue;
    Py_ssize_t at = self->source[used];
    if (self->guards[at].rule == 't') {
      slots[used] = addresses[at];
      tensors[pointers++] = flat[at];
    } else if (kind == 'i') {
      slots[used] = PyLong_AsUnsignedLongLongMask(flat[at]);
    } else if (pack_float(kind, flat[at], &slots[used])) {
      return -1;
    }
    used++;
  }
  if (PyErr_Occurred())
    return -1;
  return execute(self->kernel, grid, used, slots, NULL, tensors, pointers);
}

static int read_grid(PyObject *sizes, int32_t *grid) {
  if (!PyTuple_Check(sizes) || PyTuple_GET_SIZE(sizes) > 3)
    return 0;
  grid[0] = grid[1] = grid[2] = 1;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sizes); i++) {
    long size = PyLong_Check(PyTuple_GET_ITEM(sizes, i)) ? PyLong_AsLong(PyTuple_GET_ITEM(sizes, i)) : -1;
    if (size < 0 || size > INT32_MAX) {
      PyErr_Clear();
      return 0;
    }
    grid[i] = (int32_t)size;
  }
  return 1;
}

/* warm(grid, *arguments, **named) -> the compiled kernel that ran, or None if none fits. */
static PyObject *warm_call(PyObject *callable, PyObject *const *args, size_t flags,
                           PyObject *names) {
  static PyObject *none;
  Warm *self = (Warm *)callable;
  Py_ssize_t given = PyVectorcall_NARGS(flags) - 1;
  int32_t grid[3];
  if (!names) {
    if (!none && !(none = PyTuple_New(0)))
      return NULL;
    names = none;
  }
  if (given < 0 || !read_grid(args[0], grid))
    Py_RETURN_NONE;
  uint64_t addresses[MOST];
  for (size_t i = 0; i < self->count; i++) {
    Variant *variant = self->variants[i];
    if (variant->given != given)
      continue;
    int yes = matches(variant, args + 1, names, addresses);
    if (yes < 0)
      return NULL;
    if (!yes)
      continue;
    /* before the launch, during which other threads may add variants */
    memmove(self->variants + 1, self->variants, i * sizeof(Variant *));
    self->variants[0] = variant;
    return run_variant(variant, grid, args + 1, addresses) ? NULL : Py_NewRef(variant->compiled);
  }
  Py_RETURN_NONE;
}

/* add(arguments, names, rules, sources, launcher, address, compiled): keep a launch as a variant. */
static PyObject *add(PyObject *object, PyObject *args) {
  Warm *self = (Warm *)object;
  PyObject *arguments, *names, *launcher, *address, *compiled;
  const char *rules;
  Py_buffer sources;
  Py_ssize_t count;
  if (!PyArg_ParseTuple(args, "O!O!s#y*O!OO", &PyTuple_Type, &arguments, &PyTuple_Type, &names,
                        &rules, &count, &sources, &LauncherType, &launcher, &address, &compiled))
    return NULL;
  Variant *variant = PyMem_Calloc(1, sizeof(Variant));
  if (!variant || count != PyTuple_GET_SIZE(arguments) || count > MOST || sources.len > MOST ||
      grow((void **)&self->variants, &self->room, self->count + 1, sizeof(Variant *))) {
    PyMem_Free(variant);
    PyBuffer_Release(&sources);
    return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "one rule for each argument");
  }
  variant->kernel = (Kernel)PyLong_AsVoidPtr(address);
  variant->compiled = Py_NewRef(compiled);
  variant->names = Py_NewRef(names);
  variant->launcher = (Launcher *)Py_NewRef(launcher);
  variant->named = PyTuple_GET_SIZE(names);
  variant->given = count - variant->named;
  memcpy(variant->source, sources.buf, (size_t)sources.len);
  PyBuffer_Release(&sources);
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *argument = PyTuple_GET_ITEM(arguments, i);
    Guard *guard = &variant->guards[i];
    guard->rule = rules[i];
    guard->type = (PyTypeObject *)Py_NewRef(Py_TYPE(argument));
    if (rules[i] == 't') {
      guard->value = PyObject_GetAttr(argument, dtype_name);
      PyObject *at = PyObject_CallMethodNoArgs(argument, data_ptr);
      guard->feature = at && PyLong_AsUnsignedLongLongMask(at) % 16 == 0;
      Py_XDECREF(at);
    } else if (rules[i] == 'e') {
      guard->value = Py_NewRef(argument);
    } else if (rules[i] != 'f') {
      guard->feature = (uint8_t)feature_of_integer(argument);
    }
  }
  if (PyErr_Occurred())
    return NULL;
  memmove(self->variants + 1, self->variants, self->count++ * sizeof(Variant *));
  self->variants[0] = variant;
  Py_RETURN_NONE;
}

static Py_ssize_t variants_of(PyObject *self) { return (Py_ssize_t)((Warm *)self)->count; }
static PyMethodDef additions[] = {{"add", add, METH_VARARGS, "Keep a launch."}, {NULL}};
static PySequenceMethods sized = {.sq_length = variants_of};
static PyTypeObject WarmType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kexaone.cpu.Warm",
    .tp_basicsize = sizeof(Warm),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Warm, call),
    .tp_call = PyVectorcall_Call,
    .tp_methods = additions,
    .tp_as_sequence = &sized,
};

static PyObject *warm(PyObject *module, PyObject *unused) {
  Warm *self = PyObject_New(Warm, &WarmType);
  if (!self)
    return NULL;
  self->call = warm_call;
  self->count = self->room = 0;
  self->variants = NULL;
  return (PyObject *)self;
}
