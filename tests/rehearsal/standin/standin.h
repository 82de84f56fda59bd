/* What the parts of the stand-in share. */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* Counted since the last `standin_reset`, but for the `live` ones. standin.py reads them by these names, in this order. */
#define COUNTERS(each)                                                                                          \
    each(launches) each(graph_launches) each(captures) each(syncs) each(memsets) each(copies_up) each(copies_down) \
    each(copies_on_device) each(bytes_up) each(bytes_down) each(pageable_up) each(pageable_down)                 \
    each(device_live) each(device_peak) each(pinned_live) each(pinned_peak) each(host_live) each(host_peak)      \
    each(collectives) each(refused) each(unknown)

typedef struct {
#define each(name) int64_t name;
    COUNTERS(each)
#undef each
} Counters;

extern Counters counters;
long setting(const char *name, long otherwise);              /* an integer of the environment */
void note(const char *format, ...);                          /* a line for STANDIN_LOG, or stderr */
int refuse(int error, const char *format, ...);              /* counts and notes a call that a device refuses */
void count_unknown(const char *name);                        /* called by the stubs of standin.py, once for each */
void move(void *to, const void *from, size_t num_bytes);     /* copies what is small enough to be copied */
void *map_alias(size_t num_bytes);                           /* host.c: large host blocks; NULL if switched off */
int unmap_alias(void *pointer);                              /* host.c: whether the block was one of these */
