/* The fake NVML of the tests, with what torch asks for when memory is full. */
#include "../../fake_nvml.c"

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return OK; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, Gpu **g) { *g = &gpus[strtol(bus + 5, NULL, 16) - 1]; return OK; }
int nvmlDeviceGetComputeRunningProcesses(Gpu *g, unsigned *count, void *processes) { *count = 0; return OK; }
int nvmlDeviceGetNvLinkRemoteDeviceType(Gpu *g, unsigned link, int *type) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(Gpu *g, unsigned link, void *pci) { return NOT_SUPPORTED; }
