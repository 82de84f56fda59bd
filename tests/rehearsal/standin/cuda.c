/* A stand-in for the CUDA runtime on a machine without a GPU.

   Device memory is address space: it is counted against the card's size and cannot be touched by the host. Kernels do
   nothing, and copies of up to STANDIN_COPY_KIB are really made, so all numbers are meaningless. Every call is checked
   as the runtime checks it: copies must stay inside an allocation, a launch must fit the device, and a graph capture
   forbids what would wait for the device. What is refused is counted, and noted in STANDIN_LOG.

   STANDIN_MIB (24258)       device memory that torch sees, of each card; an RTX 3090's by default
   STANDIN_CARDS (1)         number of cards
   STANDIN_CAPABILITY (86)   compute capability
   STANDIN_NAME              name of the card
   STANDIN_DRIVER (13000)    CUDA version of the driver; older than the build's: no device can be used
   STANDIN_COPY_KIB (1024)   largest copy that is really made */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "standin.h"

#define MAX_CARDS 16
#define ALIGNMENT (2UL << 20)
#define SHARED_MEMORY 49152 /* of a block, without asking for more */

Counters counters;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int card;
static __thread cudaError_t last_error;

/* ---- settings, notes, refusals ---- */

long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtol(text, NULL, 10) : otherwise;
}

static void vnote(const char *format, va_list values) {
    static int file = -1;
    char line[1024];
    if (file < 0) {
        const char *path = getenv("STANDIN_LOG");
        file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND, 0666) : STDERR_FILENO;
    }
    int length = vsnprintf(line, sizeof line - 1, format, values);
    if (length > (int)sizeof line - 2) length = sizeof line - 2;
    line[length] = '\n';
    if (write(file, line, length + 1) < 0) perror("STANDIN_LOG");
}

void note(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vnote(format, values);
    va_end(values);
}

/* Python's stack at a call that is refused or that waits; standin.py sets these. */
static void (*on_refusal)(const char *), (*on_wait)(const char *);
void standin_on_refusal(void (*callback)(const char *)) { on_refusal = callback; }
void standin_on_wait(void (*callback)(const char *)) { on_wait = callback; }

int refuse(int error, const char *format, ...) {
    char words[512];
    va_list values;
    va_start(values, format);
    vsnprintf(words, sizeof words, format, values);
    va_end(values);
    counters.refused++;
    last_error = error;
    note("refused: %s", words);
    if (on_refusal) on_refusal(words);
    return error;
}

void count_unknown(const char *name) {
    counters.unknown++;
    note("unknown: %s", name);
}

Counters *standin_counters(void) { return &counters; }

void standin_reset(void) {
    Counters before = counters;
    memset(&counters, 0, sizeof counters);
    counters.device_live = counters.device_peak = before.device_live;
    counters.pinned_live = counters.pinned_peak = before.pinned_live;
    counters.host_live = counters.host_peak = before.host_live;
    counters.refused = before.refused, counters.unknown = before.unknown;
}

static void waits(const char *call) {
    counters.syncs++;
    if (on_wait) on_wait(call);
}

/* ---- the card ---- */

static size_t card_bytes(void) { return (size_t)setting("STANDIN_MIB", 24258) << 20; }
static int capability(void) { return setting("STANDIN_CAPABILITY", 86); }

static int num_cards(void) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    int cards = setting("STANDIN_CARDS", 1), named = visible && *visible;
    if (!visible) return cards;
    for (; *visible; visible++) named += *visible == ',';
    return named < cards ? named : cards;
}

static int most_shared_memory(void) { /* of a block: CUDA C++ Programming Guide, "Technical Specifications per CC" */
    switch (capability()) {
        case 75: return 65536;
        case 80: return 166912;
        case 90: case 100: return 232448;
        default: return 101376;
    }
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 0;
    if (setting("STANDIN_DRIVER", 13000) < CUDART_VERSION / 1000 * 1000) return last_error = cudaErrorInsufficientDriver;
    *count = num_cards();
    return *count ? cudaSuccess : (last_error = cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int *device) { *device = card; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= num_cards()) return refuse(cudaErrorInvalidDevice, "cudaSetDevice(%d)", device);
    card = device;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = setting("STANDIN_DRIVER", 13000); return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    const char *name = getenv("STANDIN_NAME");
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", name ? name : "NVIDIA GeForce RTX 3090");
    p->major = capability() / 10, p->minor = capability() % 10;
    p->uuid.bytes[0] = (char)0xaa, p->uuid.bytes[15] = device;
    p->totalGlobalMem = card_bytes();
    p->multiProcessorCount = 82, p->warpSize = 32, p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 1536, p->maxBlocksPerMultiProcessor = 16;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = SHARED_MEMORY, p->sharedMemPerBlockOptin = most_shared_memory();
    p->sharedMemPerMultiprocessor = most_shared_memory() + 1024, p->reservedSharedMemPerBlock = 1024;
    p->l2CacheSize = 6 << 20, p->memoryBusWidth = 384, p->totalConstMem = 65536, p->textureAlignment = 512;
    p->unifiedAddressing = p->concurrentKernels = p->canMapHostMemory = p->managedMemory = p->cooperativeLaunch = 1;
    p->asyncEngineCount = 2;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
        case cudaDevAttrMaxBlockDimZ: *value = 64; break;
        case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_MEMORY; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
        case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
        case cudaDevAttrClockRate: *value = 1695000; break;
        case cudaDevAttrCooperativeLaunch: *value = 1; break;
        default: *value = 0;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }

/* ---- allocations ---- */

enum kind { PAGEABLE, PINNED, DEVICE }; /* cudaMemoryType: unregistered, host, device */

typedef struct {
    char *start, *shadow; /* where the block is, and where a device's block can be read and written */
    size_t num_bytes;
    int kind, card;
} Block;

static Block *blocks;
static int num_blocks, room;

static Block *find(const void *pointer) {
    for (int i = num_blocks - 1; i >= 0; i--)
        if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].num_bytes) return &blocks[i];
    return NULL;
}

static void add_block(Block block) {
    if (num_blocks == room) blocks = realloc(blocks, (room = room ? 2 * room : 1024) * sizeof *blocks);
    blocks[num_blocks++] = block;
}

static Block take_block(void *start) {
    for (int i = num_blocks - 1; i >= 0; i--)
        if (blocks[i].start == start) {
            Block found = blocks[i];
            blocks[i] = blocks[--num_blocks];
            return found;
        }
    return (Block){0};
}

static char *address_space(size_t num_bytes, int protection) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *start = mmap(NULL, num_bytes + ALIGNMENT, protection, flags, -1, 0);
    if (start == MAP_FAILED) return NULL;
    char *aligned = (char *)(((size_t)start + ALIGNMENT - 1) & ~(ALIGNMENT - 1));
    if (aligned > start) munmap(start, aligned - start);
    munmap(aligned + num_bytes, start + ALIGNMENT - aligned);
    madvise(aligned, num_bytes, MADV_NOHUGEPAGE);
    return aligned;
}

static size_t whole_pages(size_t num_bytes) { return (num_bytes + 4095) & ~4095UL; }
static int forbidden(const char *call);

cudaError_t cudaMalloc(void **pointer, size_t num_bytes) {
    static size_t live[MAX_CARDS];
    if (forbidden("cudaMalloc")) return last_error;
    pthread_mutex_lock(&lock);
    size_t held = 0;
    for (int i = 0; i < num_blocks; i++) held += blocks[i].kind == DEVICE && blocks[i].card == card ? blocks[i].num_bytes : 0;
    live[card] = held + num_bytes;
    if (live[card] > card_bytes()) {
        pthread_mutex_unlock(&lock);
        return last_error = cudaErrorMemoryAllocation;
    }
    Block block = {NULL, NULL, num_bytes, DEVICE, card};
    block.start = address_space(whole_pages(num_bytes), PROT_NONE);
    block.shadow = address_space(whole_pages(num_bytes), PROT_READ | PROT_WRITE);
    add_block(block);
    counters.device_live = live[card];
    if (counters.device_live > counters.device_peak) counters.device_peak = counters.device_live;
    pthread_mutex_unlock(&lock);
    *pointer = block.start;
    return cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
    if (!pointer) return cudaSuccess;
    if (forbidden("cudaFree")) return last_error;
    pthread_mutex_lock(&lock);
    Block block = take_block(pointer);
    pthread_mutex_unlock(&lock);
    if (block.kind != DEVICE) return refuse(cudaErrorInvalidValue, "cudaFree of what cudaMalloc did not give");
    munmap(block.start, whole_pages(block.num_bytes));
    munmap(block.shadow, whole_pages(block.num_bytes));
    counters.device_live -= block.num_bytes;
    return cudaSuccess;
}
cudaError_t cudaMallocAsync(void **pointer, size_t num_bytes, cudaStream_t stream) { return cudaMalloc(pointer, num_bytes); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }

cudaError_t cudaHostAlloc(void **pointer, size_t num_bytes, unsigned flags) {
    if (forbidden("cudaHostAlloc")) return last_error;
    char *start = map_alias(num_bytes);
    if (!start) start = address_space(whole_pages(num_bytes), PROT_READ | PROT_WRITE);
    if (!start) return last_error = cudaErrorMemoryAllocation;
    pthread_mutex_lock(&lock);
    add_block((Block){start, start, num_bytes, PINNED, card});
    counters.pinned_live += num_bytes;
    if (counters.pinned_live > counters.pinned_peak) counters.pinned_peak = counters.pinned_live;
    pthread_mutex_unlock(&lock);
    *pointer = start;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *pointer) {
    if (!pointer) return cudaSuccess;
    pthread_mutex_lock(&lock);
    Block block = take_block(pointer);
    pthread_mutex_unlock(&lock);
    if (block.kind != PINNED) return refuse(cudaErrorInvalidValue, "cudaFreeHost of what cudaHostAlloc did not give");
    counters.pinned_live -= block.num_bytes;
    if (!unmap_alias(pointer)) munmap(pointer, whole_pages(block.num_bytes));
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void *pointer, size_t num_bytes, unsigned flags) {
    if (forbidden("cudaHostRegister")) return last_error;
    pthread_mutex_lock(&lock);
    add_block((Block){pointer, pointer, num_bytes, PINNED, card});
    counters.pinned_live += num_bytes;
    if (counters.pinned_live > counters.pinned_peak) counters.pinned_peak = counters.pinned_live;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *pointer) {
    pthread_mutex_lock(&lock);
    counters.pinned_live -= take_block(pointer).num_bytes;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    size_t context = 300UL << 20; /* of the driver; about what an RTX 3090 shows */
    *total = card_bytes();
    *free_bytes = *total - context - counters.device_live;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    pthread_mutex_lock(&lock);
    Block *block = find(pointer);
    attributes->type = block ? block->kind : PAGEABLE;
    attributes->device = block ? block->card : -2;
    if (block && block->kind == PINNED) attributes->hostPointer = (void *)pointer;
    if (block) attributes->devicePointer = (void *)pointer;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

/* ---- streams, events, graphs ---- */

typedef struct { int captures, is_blocking, priority; unsigned long long capture; } Stream;
typedef struct { Stream *recorded; int is_captured; unsigned long long capture; } Event;
typedef struct { long num_launches; } Graph;

static Stream legacy; /* the default stream */
static Stream *capturing; /* the stream that a capture began on */
static enum cudaStreamCaptureMode capture_mode;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static unsigned long long num_captures;

static Stream *stream_of(cudaStream_t stream) { return (size_t)stream <= 2 ? &legacy : (Stream *)stream; }

/* Whether a capture forbids a call that could wait for the device. cudaStreamBeginCapture says which threads may. */
static int forbidden(const char *call) {
    if (!capturing || capture_mode == cudaStreamCaptureModeRelaxed) return 0;
    if (thread_mode == cudaStreamCaptureModeRelaxed) return 0;
    return refuse(cudaErrorStreamCaptureUnsupported, "%s while a graph is captured", call);
}

static cudaError_t new_stream(cudaStream_t *stream, unsigned flags, int priority) {
    Stream *made = calloc(1, sizeof *made);
    made->is_blocking = !(flags & cudaStreamNonBlocking), made->priority = priority;
    *stream = (cudaStream_t)made;
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return new_stream(s, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return new_stream(s, flags, 0); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return new_stream(s, flags, priority); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = stream_of(stream)->priority; return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return forbidden("cudaStreamQuery") ? last_error : cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (stream_of(stream)->captures) return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize of a stream that is captured");
    if (forbidden("cudaStreamSynchronize")) return last_error;
    waits("cudaStreamSynchronize");
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
    if (forbidden("cudaDeviceSynchronize")) return last_error;
    waits("cudaDeviceSynchronize");
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = calloc(1, sizeof(Event)); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    Stream *s = stream_of(stream);
    *(Event *)event = (Event){s, s->captures, s->capture};
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }
cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (((Event *)event)->is_captured) return refuse(cudaErrorCapturedEvent, "cudaEventQuery of an event recorded in a capture");
    return forbidden("cudaEventQuery") ? last_error : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (((Event *)event)->is_captured) return refuse(cudaErrorCapturedEvent, "cudaEventSynchronize of an event recorded in a capture");
    if (forbidden("cudaEventSynchronize")) return last_error;
    waits("cudaEventSynchronize");
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) { *milliseconds = 1; return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    Event *e = (Event *)event;
    Stream *s = stream_of(stream);
    if (e->is_captured && e->recorded->captures && e->capture == e->recorded->capture) /* the stream joins the capture */
        s->captures = 1, s->capture = e->capture;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    Stream *s = stream_of(stream);
    if (s == &legacy) return refuse(cudaErrorStreamCaptureUnsupported, "capture of the default stream");
    if (capturing) return refuse(cudaErrorIllegalState, "a capture within a capture");
    s->captures = 1, s->capture = ++num_captures;
    capturing = s, capture_mode = mode;
    counters.captures++;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    Stream *s = stream_of(stream);
    if (s != capturing) return refuse(cudaErrorStreamCaptureUnmatched, "the end of a capture on another stream");
    s->captures = 0, capturing = NULL;
    *graph = (cudaGraph_t)calloc(1, sizeof(Graph));
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = stream_of(stream)->captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *num_nodes) {
    static Graph captured;
    cudaStreamIsCapturing(stream, status);
    if (id) *id = stream_of(stream)->capture;
    if (graph) *graph = (cudaGraph_t)&captured;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (num_nodes) *num_nodes = 0;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = (cudaGraphExec_t)calloc(1, sizeof(Graph));
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { counters.graph_launches++; return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { free(graph); return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { free(graph); return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) { function(data); return cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned flags) {
    function(stream, cudaSuccess, data);
    return cudaSuccess;
}

/* ---- copies ---- */

void move(void *to, const void *from, size_t num_bytes) {
    pthread_mutex_lock(&lock);
    Block *target = find(to), *source = find(from);
    char *real_to = target ? target->shadow + ((char *)to - target->start) : to;
    const char *real_from = source ? source->shadow + ((char *)from - source->start) : from;
    pthread_mutex_unlock(&lock);
    if (to != from && num_bytes <= (size_t)setting("STANDIN_COPY_KIB", 1024) << 10) memmove(real_to, real_from, num_bytes);
}

static size_t rest_of(const Block *block, const void *pointer) {
    return block ? (size_t)(block->start + block->num_bytes - (char *)pointer) : SIZE_MAX;
}

static cudaError_t copy(void *to, const void *from, size_t num_bytes, int is_async, cudaStream_t stream) {
    pthread_mutex_lock(&lock);
    Block *target = find(to), *source = find(from);
    enum kind to_kind = target ? target->kind : PAGEABLE, from_kind = source ? source->kind : PAGEABLE;
    size_t most = rest_of(target, to) < rest_of(source, from) ? rest_of(target, to) : rest_of(source, from);
    pthread_mutex_unlock(&lock);
    if (num_bytes > most) return refuse(cudaErrorInvalidValue, "a copy of %zu bytes where %zu are left", num_bytes, most);
    int goes_up = to_kind == DEVICE && from_kind != DEVICE, goes_down = from_kind == DEVICE && to_kind != DEVICE;
    int is_pageable = (goes_up && from_kind == PAGEABLE) || (goes_down && to_kind == PAGEABLE);
    counters.copies_up += goes_up, counters.copies_down += goes_down;
    counters.copies_on_device += to_kind == DEVICE && from_kind == DEVICE;
    counters.bytes_up += goes_up ? num_bytes : 0, counters.bytes_down += goes_down ? num_bytes : 0;
    counters.pageable_up += goes_up && is_pageable, counters.pageable_down += goes_down && is_pageable;
    if (is_pageable && stream_of(stream)->captures)
        return refuse(cudaErrorStreamCaptureUnsupported, "a copy of memory that is not pinned while a graph is captured");
    if (!is_async) {
        if (forbidden("cudaMemcpy")) return last_error;
        waits("cudaMemcpy");
    }
    if (!stream_of(stream)->captures) move(to, from, num_bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t stream) { return copy(to, from, n, 1, stream); }
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) { return copy(to, from, n, 0, NULL); }
cudaError_t cudaMemcpyPeerAsync(void *to, int to_card, const void *from, int from_card, size_t n, cudaStream_t stream) { return copy(to, from, n, 1, stream); }
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++) {
        cudaError_t error = copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, 1, stream);
        if (error) return error;
    }
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *pointer, int value, size_t num_bytes, cudaStream_t stream) {
    pthread_mutex_lock(&lock);
    Block *block = find(pointer);
    size_t most = rest_of(block, pointer);
    char *real = block ? block->shadow + ((char *)pointer - block->start) : pointer;
    pthread_mutex_unlock(&lock);
    if (num_bytes > most) return refuse(cudaErrorInvalidValue, "a memset of %zu bytes where %zu are left", num_bytes, most);
    counters.memsets++;
    if (!stream_of(stream)->captures && num_bytes <= (size_t)setting("STANDIN_COPY_KIB", 1024) << 10) memset(real, value, num_bytes);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *pointer, int value, size_t num_bytes) { return cudaMemsetAsync(pointer, value, num_bytes, NULL); }

/* ---- kernels ---- */

typedef struct { const void *function; const char *name; long most_shared; } Kernel;
typedef struct { dim3 grid, block; size_t shared; void *stream; } Configuration;

static Kernel *kernels;
static int num_kernels, kernel_room, num_sorted;
static __thread Configuration configurations[16];
static __thread int num_configurations;

void **__cudaRegisterFatBinary(void *binary) { return calloc(1, sizeof(void *)); }
void __cudaRegisterFatBinaryEnd(void **binary) {}
void __cudaUnregisterFatBinary(void **binary) {}
char __cudaInitModule(void **binary) { return 1; }
void __cudaRegisterVar(void **binary, char *host, char *device, const char *name, int is_extern, size_t size, int is_constant, int is_global) {}
void __cudaRegisterFunction(void **binary, const char *function, char *device, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {
    pthread_mutex_lock(&lock);
    if (num_kernels == kernel_room) kernels = realloc(kernels, (kernel_room = kernel_room ? 2 * kernel_room : 65536) * sizeof *kernels);
    kernels[num_kernels++] = (Kernel){function, name, SHARED_MEMORY};
    pthread_mutex_unlock(&lock);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configurations[num_configurations++] = (Configuration){grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    Configuration *last = &configurations[--num_configurations];
    *grid = last->grid, *block = last->block, *shared = last->shared, *(void **)stream = last->stream;
    return cudaSuccess;
}

static int by_address(const void *a, const void *b) {
    const char *left = ((const Kernel *)a)->function, *right = ((const Kernel *)b)->function;
    return (left > right) - (left < right);
}
static Kernel *kernel_of(const void *function) {
    static Kernel other = {NULL, "a kernel that was not registered", SHARED_MEMORY};
    pthread_mutex_lock(&lock);
    if (num_sorted != num_kernels) qsort(kernels, num_sorted = num_kernels, sizeof *kernels, by_address);
    Kernel key = {function}, *found = bsearch(&key, kernels, num_kernels, sizeof *kernels, by_address);
    pthread_mutex_unlock(&lock);
    return found ? found : &other;
}

static cudaError_t launch(const void *function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    Kernel *kernel = kernel_of(function);
    counters.launches++;
    if (capturing && !stream_of(stream)->captures && thread_mode != cudaStreamCaptureModeRelaxed)
        return refuse(cudaErrorStreamCaptureIsolation, "%s is launched beside the graph that is captured", kernel->name);
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || !block.x ||
        (size_t)block.x * block.y * block.z > 1024 || block.z > 64 || shared > (size_t)most_shared_memory())
        return refuse(cudaErrorInvalidConfiguration, "%s: grid %u %u %u, block %u %u %u, %zu bytes shared", kernel->name,
                      grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
    if (shared > (size_t)kernel->most_shared)
        return refuse(cudaErrorInvalidValue, "%s: %zu bytes shared, and %ld were asked for", kernel->name, shared, kernel->most_shared);
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) { return launch(f, grid, block, shared, s); }
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) { return launch((void *)f, grid, block, shared, s); }
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) { return launch(f, grid, block, shared, s); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **arguments) { return launch(f, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream); }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (cudaKernel_t)function; return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > most_shared_memory()) return refuse(cudaErrorInvalidValue, "%s: %d bytes shared, more than the device has", kernel_of(function)->name, value);
    kernel_of(function)->most_shared = value;
    return cudaSuccess;
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t f, enum cudaFuncAttribute attribute, int value, int device) { return cudaFuncSetAttribute((void *)f, attribute, value); }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = capability();
    attributes->maxDynamicSharedSizeBytes = kernel_of(function)->most_shared;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *f, int threads, size_t shared) {
    *count = threads > 768 ? 1 : threads > 192 ? 1536 / threads : 8;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *f, int threads, size_t shared, unsigned flags) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, f, threads, shared);
}
static char device_symbols[1 << 16];
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) { *pointer = device_symbols; return cudaSuccess; }

/* ---- errors ---- */

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorOfTheStandIn"; }
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        default: return "refused by the stand-in for the CUDA runtime";
    }
}

/* ---- the driver's functions, by the names that torch asks for ---- */

static int answer_ok(void) { return 0; }
static int context_state(int device, unsigned *flags, int *is_active) {
    if (flags) *flags = 0;
    if (is_active) *is_active = 1;
    return 0;
}
static int error_string(int error, const char **text) { *text = "an error of the stand-in"; return 0; }
static int address_range(void **start, size_t *num_bytes, void *pointer) {
    Block *block = find(pointer);
    if (block && start) *start = block->start;
    if (block && num_bytes) *num_bytes = block->num_bytes;
    return 0;
}
static int device_attribute(int *value, int attribute, int device) { *value = 0; return 0; }
static int current_context(void **context) { *context = device_symbols; return 0; }
static int count_devices(int *count) { return cudaGetDeviceCount(count); }

static const struct { const char *name; void *function; } driver[] = {
    {"cuDevicePrimaryCtxGetState", context_state}, {"cuGetErrorString", error_string}, {"cuMemGetAddressRange", address_range},
    {"cuDeviceGetAttribute", device_attribute}, {"cuDeviceGetCount", count_devices}, {"cuCtxGetCurrent", current_context},
};
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *function = answer_ok;
    for (size_t i = 0; i < sizeof driver / sizeof *driver; i++)
        if (!strncmp(name, driver[i].name, strlen(driver[i].name))) *function = driver[i].function;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) { memset(value, 0, 8); return cudaSuccess; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) { *pool = (cudaMemPool_t)device_symbols; return cudaSuccess; }
