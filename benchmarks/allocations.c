/* Counts what torch's CPU allocator has given out, over all threads: preload it, and read or reset the counters through
 * ctypes. torch takes every tensor's memory by posix_memalign (c10/core/impl/alloc_cpu.cpp); other blocks aren't
 * counted, nor are small ones. torch.profiler counts the same, but misses what another thread frees: gloo's do.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#define SLOTS (1u << 18)
#define LEAST 4096 /* smallest block that counts: it keeps the table small and free() fast */

static void* blocks[SLOTS];
static size_t sizes[SLOTS];
static size_t current, peak;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void* const REMOVED = (void*)1;

static unsigned start_of(void* block) { return (unsigned)(((uintptr_t)block >> 6) * 2654435761u) % SLOTS; }

int posix_memalign(void** block, size_t alignment, size_t size) {
    static int (*next)(void**, size_t, size_t);
    if (!next) next = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    int failed = next(block, alignment, size);
    if (failed || size < LEAST) return failed;
    pthread_mutex_lock(&lock);
    unsigned slot = start_of(*block);
    while (blocks[slot] && blocks[slot] != REMOVED) slot = (slot + 1) % SLOTS;
    blocks[slot] = *block;
    sizes[slot] = size;
    current += size;
    if (current > peak) peak = current;
    pthread_mutex_unlock(&lock);
    return 0;
}

void free(void* block) {
    static void (*next)(void*);
    if (!next) next = (void (*)(void*))dlsym(RTLD_NEXT, "free");
    if (block && malloc_usable_size(block) >= LEAST) {
        pthread_mutex_lock(&lock);
        for (unsigned slot = start_of(block); blocks[slot]; slot = (slot + 1) % SLOTS) {
            if (blocks[slot] == block) {
                blocks[slot] = REMOVED;
                current -= sizes[slot];
                break;
            }
        }
        pthread_mutex_unlock(&lock);
    }
    next(block);
}

size_t allocated_bytes(void) { return current; }
size_t allocated_peak(void) { return peak; }
void reset_allocated_peak(void) { peak = current; }
