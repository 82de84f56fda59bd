/* The driver's library, as far as torch and Triton ask it for answers; standin.py adds the rest of cuda.h's functions,
   which succeed. */
#include <stdlib.h>

static char context;
int cuCtxGetCurrent(void **current) { *current = &context; return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) { /* CUdevice_attribute */
    const char *text = getenv("STANDIN_CAPABILITY");
    int capability = text ? atoi(text) : 86;
    switch (attribute) {
        case 1: *value = 1024; break;           /* threads of a block */
        case 10: *value = 32; break;            /* threads of a warp */
        case 16: *value = 82; break;            /* multiprocessors */
        case 75: *value = capability / 10; break;
        case 76: *value = capability % 10; break;
        case 97: *value = 101376; break;        /* shared memory of a block */
        default: *value = 0;
    }
    return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) { /* CUfunction_attribute */
    *value = attribute == 0 ? 1024 : 0; /* threads of a block */
    return 0;
}
