/* A libnvidia-ml.so.1 whose GPUs stand in FAKE_GPUS, one a line:
   name|uuid|total MiB (- where the host's memory is shared)|free MiB|compute capability, as 86|MIG mode|NVLinks
   FAKE_USER is a process that computes on each GPU, "pid MiB".
   gcc -shared -fPIC -o libnvidia-ml.so.1 fake_nvml.c */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char name[96], uuid[96], total[16]; long free_mib; int capability, mig, links; } Gpu;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned pid; unsigned long long used; unsigned instances[2]; } Process;
enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, DRIVER_NOT_LOADED = 9 };
static Gpu gpus[16];
static int num_gpus;

int nvmlInitWithFlags(unsigned flags) {
    const char *line = getenv("FAKE_GPUS");
    if (!line) return DRIVER_NOT_LOADED;
    for (num_gpus = 0; *line && num_gpus < 16; num_gpus++) {
        Gpu *g = &gpus[num_gpus];
        if (sscanf(line, "%95[^|]|%95[^|]|%15[^|]|%ld|%d|%d|%d", g->name, g->uuid, g->total, &g->free_mib,
                   &g->capability, &g->mig, &g->links) != 7) return INVALID;
        if (!(line = strchr(line, '\n'))) { num_gpus++; break; }
        line++;
    }
    return OK;
}
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return "an error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = num_gpus; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, Gpu **g) {
    *g = &gpus[i];
    return (int)i < num_gpus ? OK : INVALID;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, Gpu **g) {
    for (int i = 0; i < num_gpus; i++)
        if (!strcmp(gpus[i].uuid, uuid)) { *g = &gpus[i]; return OK; }
    return NOT_FOUND;
}
int nvmlDeviceGetName(Gpu *g, char *text, unsigned size) { snprintf(text, size, "%s", g->name); return OK; }
int nvmlDeviceGetUUID(Gpu *g, char *text, unsigned size) { snprintf(text, size, "%s", g->uuid); return OK; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    snprintf(text, size, "%s", getenv("FAKE_DRIVER") ? getenv("FAKE_DRIVER") : "580.95.05");
    return OK;
}
int nvmlDeviceGetMemoryInfo(Gpu *g, Memory *memory) {
    if (*g->total == '-') return NOT_SUPPORTED;
    memory->total = atoll(g->total) << 20;
    memory->free = (unsigned long long)g->free_mib << 20;
    memory->used = memory->total - memory->free;
    return OK;
}
int nvmlDeviceGetCudaComputeCapability(Gpu *g, int *major, int *minor) {
    *major = g->capability / 10, *minor = g->capability % 10;
    return OK;
}
int nvmlDeviceGetMigMode(Gpu *g, unsigned *now, unsigned *pending) {
    *now = *pending = g->mig > 0;
    return g->mig < 0 ? NOT_SUPPORTED : OK;
}
int nvmlDeviceGetNvLinkState(Gpu *g, unsigned link, unsigned *is_active) {
    *is_active = 1;
    return (int)link < g->links ? OK : INVALID;
}
int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *g, unsigned *count, Process *found) {
    const char *user = getenv("FAKE_USER");
    unsigned room = *count;
    *count = user != NULL;
    if (!user) return OK;
    if (!room) return TOO_SMALL;
    sscanf(user, "%u %llu", &found->pid, &found->used);
    found->used <<= 20;
    return OK;
}
