/* How a kernel runs: the caller and threads of XLA's own pool take chunks of the arrays, one after the other.

   The caller takes chunks itself, and waits for those alone that others have begun, so that it needs no free thread. */

typedef struct {
  atomic_llong next;    /* the first chunk that nobody has taken */
  atomic_llong left;    /* how many are not finished */
  atomic_int holders;   /* threads that still look at this */
  int64_t size, rows, chunks; /* numbers of a row, rows, chunks of a row */
  fenv_t mode;          /* whether XLA flushes denormal numbers, on the thread of the caller */
  void *in[INPUTS], *out[OUTPUTS + SUMS];
  double sums[];        /* of each chunk, so that they do not depend on who takes it */
} Work;

static void take(Work *work) {
  for (;;) {
    int64_t chunk = atomic_fetch_add(&work->next, 1);
    if (chunk >= work->rows * work->chunks) return;
    int64_t begin = chunk % work->chunks * CHUNK, left = work->size - begin;
    int64_t end = begin + (CHUNK < left ? CHUNK : left);
    run(work->in, work->out, chunk / work->chunks, work->size, begin, end, work->sums + chunk * SUMS);
    atomic_fetch_sub(&work->left, 1);
  }
}

static void drop(Work *work) {
  if (atomic_fetch_sub(&work->holders, 1) == 1) free(work);
}

static void help(void *data) {
  Work *work = data;
  fenv_t own;
  fegetenv(&own);
  fesetenv(&work->mode);
  take(work);
  fesetenv(&own);
  drop(work);
}

static XLA_FFI_Error *failed(XLA_FFI_CallFrame *frame, const char *message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = message, .errc = XLA_FFI_Error_Code_INTERNAL};
  return frame->api->XLA_FFI_Error_Create(&args);
}

static void forget(XLA_FFI_CallFrame *frame, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args args = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
  frame->api->XLA_FFI_Error_Destroy(&args);
}

static int64_t threads(XLA_FFI_CallFrame *frame) {
  int64_t count = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
                                             .ctx = frame->ctx, .num_threads = &count};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&args);
  if (error) forget(frame, error);
  return error ? 1 : count;
}

XLA_FFI_Error *kernel(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Extension_Base *extension = frame->extension_start;
  if (extension && extension->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    return NULL;
  }
  if (frame->attrs.size != 1 || frame->args.size != INPUTS || frame->rets.size != OUTPUTS + SUMS) return failed(frame, "jaxoptim: another kernel");
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer **)frame->args.args, **out = (XLA_FFI_Buffer **)frame->rets.rets;
  for (int at = 0; at < IN_PLACE; ++at)
    if (in[in_place[at][0]]->data != out[in_place[at][1]]->data) return failed(frame, "jaxoptim: not in place");
  int64_t size = PARTS, rows = 1;
  if (PARTS) {
    XLA_FFI_Buffer *like = in[FIRST];
    int64_t axes = *(int64_t *)((XLA_FFI_Scalar *)frame->attrs.attrs[0])->value;
    for (int64_t axis = 0; axis < like->rank; ++axis) *(axis < like->rank - axes ? &rows : &size) *= like->dims[axis];
  }
  int64_t chunks = (size + CHUNK - 1) / CHUNK, all = rows * chunks;
  Work *work = calloc(1, sizeof(Work) + sizeof(double) * all * SUMS);
  if (!work) return failed(frame, "jaxoptim: no memory");
  work->size = size;
  work->rows = rows;
  work->chunks = chunks;
  for (int at = 0; at < INPUTS; ++at) work->in[at] = in[at]->data;
  for (int at = 0; at < OUTPUTS + SUMS; ++at) work->out[at] = out[at]->data;
  int64_t others = threads(frame) - 1;
  if (others > all - 1) others = all - 1;
  if (others < 0) others = 0;
  atomic_init(&work->next, 0);
  atomic_init(&work->left, all);
  atomic_init(&work->holders, 1 + (int)others);
  fegetenv(&work->mode);
  for (int64_t at = 0; at < others; ++at) {
    XLA_FFI_ThreadPool_Schedule_Args args = {.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
                                             .ctx = frame->ctx, .task = help, .data = work};
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&args);
    if (error) {
      forget(frame, error);
      drop(work);
    }
  }
  take(work);
  while (atomic_load(&work->left) > 0) sched_yield();
  for (int64_t row = 0; SUMS && row < rows; ++row) {
    double *sums = work->sums + row * chunks * SUMS;
    for (int64_t at = SUMS; at < chunks * SUMS; ++at) sums[at % (SUMS ? SUMS : 1)] += sums[at];
    store(work->out, row, sums);
  }
  drop(work);
  return NULL;
}
