/* Large blocks of host memory share one small piece of real memory: what is written there is lost, what is asked for is
   counted. So 50 GiB of an offloaded optimizer fit into a small machine. With STANDIN_ALIAS_MIB=0 they are real.

   STANDIN_ALIAS_MIB (4)   the smallest block that is shared */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "standin.h"

#define SEGMENT (64UL << 20) /* of real memory */
#define ALIGNMENT (2UL << 20)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { char *start; size_t num_bytes; } aliases[1 << 16];
static int num_aliases;

void *map_alias(size_t num_bytes) {
    static int file = -1;
    size_t smallest = (size_t)setting("STANDIN_ALIAS_MIB", 4) << 20, length = (num_bytes + 4095) & ~4095UL;
    if (!smallest || num_bytes < smallest) return NULL;
    pthread_mutex_lock(&lock);
    if (file < 0 && ((file = memfd_create("standin", 0)) < 0 || ftruncate(file, SEGMENT))) abort();
    char *start = mmap(NULL, length + ALIGNMENT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) abort();
    char *aligned = (char *)(((size_t)start + ALIGNMENT - 1) & ~(ALIGNMENT - 1));
    if (aligned > start) munmap(start, aligned - start);
    munmap(aligned + length, start + ALIGNMENT - aligned);
    for (size_t offset = 0; offset < length; offset += SEGMENT) {
        size_t piece = length - offset < SEGMENT ? length - offset : SEGMENT;
        if (mmap(aligned + offset, piece, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) abort();
    }
    aliases[num_aliases].start = aligned, aliases[num_aliases++].num_bytes = num_bytes;
    counters.host_live += num_bytes;
    if (counters.host_live > counters.host_peak) counters.host_peak = counters.host_live;
    pthread_mutex_unlock(&lock);
    return aligned;
}

int unmap_alias(void *pointer) {
    if (((size_t)pointer & (ALIGNMENT - 1)) || !num_aliases) return 0;
    pthread_mutex_lock(&lock);
    int i = num_aliases - 1;
    while (i >= 0 && aliases[i].start != pointer) i--;
    if (i >= 0) {
        munmap(pointer, (aliases[i].num_bytes + 4095) & ~4095UL);
        counters.host_live -= aliases[i].num_bytes;
        aliases[i] = aliases[--num_aliases];
    }
    pthread_mutex_unlock(&lock);
    return i >= 0;
}

int posix_memalign(void **pointer, size_t alignment, size_t num_bytes) { /* torch's tensors come from here */
    static int (*real)(void **, size_t, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "posix_memalign");
    void *alias = map_alias(num_bytes);
    if (!alias) return real(pointer, alignment, num_bytes);
    *pointer = alias;
    return 0;
}

void free(void *pointer) {
    static void (*real)(void *);
    if (!real) real = dlsym(RTLD_NEXT, "free");
    if (!pointer || !unmap_alias(pointer)) real(pointer);
}
