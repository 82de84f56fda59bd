/* The few functions of cuBLAS and NCCL that must answer something; those that need not are stubs (standin.py).

   Collectives act as if every process had sent the same: all processes of a run do the same work. */
#include <stdlib.h>
#include <string.h>

#include "standin.h"

typedef void *Handle;
typedef struct { int rank, size; } Communicator;

static int make(Handle *handle) { *handle = calloc(1, 4096); return 0; }

int cublasCreate_v2(Handle *handle) { return make(handle); }
int cublasGetMathMode(Handle handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(Handle handle, int *mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulDescCreate(Handle *made) { return make(made); }
int cublasLtMatrixLayoutCreate(Handle *made) { return make(made); }
int cublasLtMatmulPreferenceCreate(Handle *made) { return make(made); }
int cublasLtMatmulAlgoGetHeuristic(Handle h, Handle d, Handle a, Handle b, Handle c, Handle e, Handle p, int most, char *result, int *found) {
    memset(result, 0, 96); /* one algorithm, without a workspace */
    *found = 1;
    return 0;
}
/* What has nothing to answer. */
#define DOES_NOTHING(name) int name(void) { return 0; }
DOES_NOTHING(cublasSetStream_v2) DOES_NOTHING(cublasSetWorkspace_v2) DOES_NOTHING(cublasSetMathMode)
DOES_NOTHING(cublasSetPointerMode_v2) DOES_NOTHING(cublasDestroy_v2) DOES_NOTHING(cublasLtMatmulDescSetAttribute)
DOES_NOTHING(cublasLtMatmulPreferenceSetAttribute) DOES_NOTHING(cublasLtMatrixLayoutSetAttribute)
DOES_NOTHING(cublasLtMatrixLayoutDestroy) DOES_NOTHING(cublasLtMatmulDescDestroy) DOES_NOTHING(cublasLtMatmulPreferenceDestroy)
DOES_NOTHING(ncclBcast) DOES_NOTHING(ncclGroupStart) DOES_NOTHING(ncclGroupEnd) DOES_NOTHING(ncclCommDestroy) DOES_NOTHING(ncclCommAbort)
DOES_NOTHING(ncclCommRegister) DOES_NOTHING(ncclCommDeregister) DOES_NOTHING(ncclCommFinalize)

static int product(void) { counters.launches++; return 0; }
int cublasLtMatmul(void) { return product(); }
int cublasGemmEx(void) { return product(); }
int cublasGemmStridedBatchedEx(void) { return product(); }
int cublasSgemm_v2(void) { return product(); }
int cublasSgemmStridedBatched(void) { return product(); }

int ncclGetVersion(int *version) { *version = 22907; return 0; }
const char *ncclGetErrorString(int result) { return "an error of the stand-in"; }
const char *ncclGetLastError(Communicator *c) { return ""; }
int ncclGetUniqueId(char *id) { memset(id, 1, 128); return 0; }
typedef struct { char bytes[128]; } UniqueId;
static int join(Communicator **made, int size, int rank) {
    *made = calloc(1, sizeof **made);
    (*made)->rank = rank, (*made)->size = size;
    return 0;
}
int ncclCommInitRank(Communicator **made, int size, UniqueId id, int rank) { return join(made, size, rank); }
int ncclCommInitRankConfig(Communicator **made, int size, UniqueId id, int rank, void *config) { return join(made, size, rank); }
int ncclCommInitRankScalable(Communicator **made, int size, int rank, int num_ids, void *ids, void *config) { return join(made, size, rank); }
int ncclCommSplit(Communicator *c, int color, int key, Communicator **made, void *config) { return join(made, c->size, c->rank); }
int ncclCommCount(Communicator *c, int *count) { *count = c->size; return 0; }
int ncclCommUserRank(Communicator *c, int *rank) { *rank = c->rank; return 0; }
int ncclCommGetAsyncError(Communicator *c, int *error) { *error = 0; return 0; }

static const size_t item_bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; /* by ncclDataType_t */

int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, Communicator *c, void *stream) {
    counters.collectives++;
    move(to, from, count * item_bytes[type]);
    return 0;
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Communicator *c, void *stream) {
    return ncclAllReduce(from, to, count, type, 0, c, stream);
}
int ncclReduceScatter(const void *from, void *to, size_t count, int type, int op, Communicator *c, void *stream) {
    return ncclAllReduce(from, to, count, type, op, c, stream);
}
int ncclAllGather(const void *from, void *to, size_t count, int type, Communicator *c, void *stream) {
    counters.collectives++;
    for (int rank = 0; rank < c->size; rank++) move((char *)to + rank * count * item_bytes[type], from, count * item_bytes[type]);
    return 0;
}
