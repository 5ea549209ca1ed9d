// What AddressSanitizer and ThreadSanitizer must be told about stacks that the emulator switches by itself.
//
// Under ThreadSanitizer every CUDA thread is a fiber of its own, so that two threads that touch the same memory with no
// barrier between are reported, however the emulator happened to order them. The scheduler's own accesses are ignored.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#define UNSANITIZED __attribute__((noinline, no_sanitize("thread")))

namespace emulator {

#if defined(__SANITIZE_THREAD__)
constexpr bool THREAD_SANITIZER = true;

// A scope in which ThreadSanitizer looks away.
struct Unseen {
    Unseen() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unseen() {
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    }
};
inline void* new_fiber() { return __tsan_create_fiber(0); }
inline void* current_fiber() { return __tsan_get_current_fiber(); }
inline void delete_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void enter_fiber(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
// Everything before release(key) on one fiber happens before what follows acquire(key) on another.
inline void release(void* key) { __tsan_release(key); }
inline void acquire(void* key) { __tsan_acquire(key); }
#else
constexpr bool THREAD_SANITIZER = false;
struct Unseen {
    Unseen() {}
    ~Unseen() {}
};
inline void* new_fiber() { return nullptr; }
inline void* current_fiber() { return nullptr; }
inline void delete_fiber(void*) {}
inline void enter_fiber(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif

#if defined(__SANITIZE_ADDRESS__)
inline void fresh_stack(void* stack, size_t size) { __asan_unpoison_memory_region(stack, size); }
inline void before_switch(void** fake, const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(fake, stack, size);
}
inline void after_switch(void* fake, const void** old_stack, size_t* old_size) {
    __sanitizer_finish_switch_fiber(fake, old_stack, old_size);
}
#else
inline void fresh_stack(void*, size_t) {}
inline void before_switch(void**, const void*, size_t) {}
inline void after_switch(void*, const void**, size_t*) {}
#endif

}  // namespace emulator
