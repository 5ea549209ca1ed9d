// Runs CUDA C++ kernels on a CPU, one stack a CUDA thread, one block at a time. Linux on x86-64, g++, C++17.
//
// A thread runs until its next barrier or warp operation; the schedule decides who runs next. Shared memory starts out
// as NaN. Found by the emulator itself: barriers that some threads of a block don't reach or reach at another line,
// warp operations whose mask names other lanes than take part, deadlocks. Found by a sanitizer in the build: accesses
// out of bounds (AddressSanitizer) and races (ThreadSanitizer). Not covered: the compiled GPU code, its approximate
// functions, fences, occupancy, speed.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "sanitizers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define SHARED(type, name, count)     \
    static const char name##_key = 0; \
    type* name = static_cast<type*>(emulator::shared_array(&name##_key, sizeof(type) * (count)))

struct uint3 {
    unsigned x, y, z;
};

namespace emulator {

constexpr unsigned WARP_LANES = 32;
constexpr size_t STACK = 64 << 10, GUARD = 4096;

enum class Schedule : int { forward, reverse, random };
enum class State { running, at_barrier, in_warp_operation, finished };

struct Thread {
    void* stack_pointer;
    char* stack;
    State state;
    int line;         // of the barrier or warp operation that it waits at
    unsigned mask;    // the warp operation's
    unsigned source;  // lane whose value it wants
    uint64_t value, result;
    void* fiber;
    void* fake_stack;
    uint3 index;
};

struct SharedArray {
    const void* key;
    void* memory;
};

struct Block {
    uint3 index;
    std::vector<Thread> threads;
    std::vector<SharedArray> shared;
    const std::function<void()>* kernel;
    std::string error;
    uint64_t random;
    void* scheduler;        // its stack pointer
    void* scheduler_fiber;  // ThreadSanitizer's
    const void* scheduler_stack;
    size_t scheduler_stack_size;
    char* barrier;  // an address that stands for the block's barrier
    char* end;      // and one for the end of the grid
};

inline Block* block = nullptr;
inline Thread* thread = nullptr;

// Saves the callee-saved registers on this stack, its pointer in *from, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
__asm__(
    ".text\n.weak emulator_switch\n.type emulator_switch,@function\nemulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size emulator_switch,.-emulator_switch\n");

UNSANITIZED inline void to_scheduler() {
    Thread* self = thread;
    before_switch(self->state == State::finished ? nullptr : &self->fake_stack, block->scheduler_stack,
                  block->scheduler_stack_size);
    enter_fiber(block->scheduler_fiber);
    emulator_switch(&self->stack_pointer, block->scheduler);
    after_switch(self->fake_stack, nullptr, nullptr);
}

UNSANITIZED inline void to_thread(Thread& next) {
    thread = &next;
    void* fake_stack = nullptr;
    before_switch(&fake_stack, next.stack, STACK);
    enter_fiber(next.fiber);
    emulator_switch(&block->scheduler, next.stack_pointer);
    after_switch(fake_stack, nullptr, nullptr);
}

// Where a thread's stack starts.
UNSANITIZED inline void run_kernel() {
    after_switch(nullptr, &block->scheduler_stack, &block->scheduler_stack_size);
    acquire(block->barrier);
    (*block->kernel)();
    release(block->end);
    thread->state = State::finished;
    to_scheduler();
    abort();
}

inline unsigned thread_number(const Thread& t) { return unsigned(&t - block->threads.data()); }

// Waits for the others. Memory is ordered by barriers only: shuffles order none, as on a GPU.
UNSANITIZED inline void wait_at(State state, int line) {
    void* key = state == State::at_barrier ? block->barrier : nullptr;
    thread->state = state;
    thread->line = line;
    if (key) release(key);
    to_scheduler();
    if (key) acquire(key);
}

template <class T>
UNSANITIZED T shuffle(unsigned mask, T value, unsigned source, int line) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    thread->mask = mask;
    thread->source = source;
    std::memcpy(&thread->value, &value, sizeof value);
    wait_at(State::in_warp_operation, line);
    std::memcpy(&value, &thread->result, sizeof value);
    return value;
}

// A block's shared array, all bits set: NaN until written. On the heap, for AddressSanitizer's sake.
UNSANITIZED inline void* shared_array(const void* key, size_t size) {
    const Unseen unseen;
    for (const SharedArray& array : block->shared) {
        if (array.key == key) return array.memory;
    }
    void* memory = std::memset(aligned_alloc(16, (size + 15) / 16 * 16), 0xff, size);
    block->shared.push_back({key, memory});
    return memory;
}

inline std::string describe(const Thread& t) {
    return "block " + std::to_string(block->index.x) + " thread " + std::to_string(t.index.x) + " line " +
           std::to_string(t.line);
}

// Whether every lane that the mask of `lanes[i]` names waits in the same operation; an error where it never can.
UNSANITIZED inline bool warp_is_complete(const Thread* lanes, unsigned count, unsigned i) {
    const Thread& self = lanes[i];
    if (!(self.mask >> i & 1u)) {
        block->error = "warp operation: the caller isn't in its mask: " + describe(self);
        return false;
    }
    bool complete = true;
    for (unsigned j = 0; j < WARP_LANES; j++) {
        if (!(self.mask >> j & 1u)) continue;
        if (j >= count || lanes[j].state == State::finished) {
            block->error = "warp operation: lane " + std::to_string(j) + " has left: " + describe(self);
            return false;
        }
        complete &=
            lanes[j].state == State::in_warp_operation && lanes[j].mask == self.mask && lanes[j].line == self.line;
    }
    return complete;
}

// Finishes the warp operations whose lanes have all arrived; whether there were any.
UNSANITIZED inline bool finish_warp(Thread* lanes, unsigned count) {
    bool progress = false;
    for (unsigned i = 0; i < count; i++) {
        if (lanes[i].state != State::in_warp_operation || !warp_is_complete(lanes, count, i)) continue;
        const unsigned mask = lanes[i].mask;
        for (unsigned j = 0; j < count; j++) {
            if (!(mask >> j & 1u)) continue;
            lanes[j].result = mask >> lanes[j].source & 1u ? lanes[lanes[j].source].value : ~uint64_t(0);
            lanes[j].state = State::running;
        }
        progress = true;
    }
    return progress;
}

UNSANITIZED inline bool finish_warps() {
    bool progress = false;
    const unsigned count = unsigned(block->threads.size());
    for (unsigned first = 0; first < count && block->error.empty(); first += WARP_LANES) {
        progress |= finish_warp(&block->threads[first], std::min(WARP_LANES, count - first));
    }
    return progress;
}

// Nobody can run: lets everybody pass if all wait at one barrier, else says what is wrong.
UNSANITIZED inline void open_barrier() {
    const Thread* first = nullptr;
    for (const Thread& t : block->threads) {
        if (t.state != State::at_barrier) continue;
        if (first && first->line != t.line) {
            block->error = "divergent barrier: " + describe(*first) + " and " + describe(t);
        }
        first = &t;
    }
    for (const Thread& t : block->threads) {
        if (t.state == State::in_warp_operation) {
            block->error = "deadlock: " + describe(t) + (first ? " and " + describe(*first) : "");
        }
        if (t.state == State::finished && first) {
            block->error = "divergent barrier: a thread has left before " + describe(*first);
        }
    }
    for (Thread& t : block->threads) {
        if (t.state == State::at_barrier) t.state = State::running;
    }
}

// Runs each thread that can run up to its next wait; how many finished, and whether any ran.
UNSANITIZED inline std::pair<unsigned, bool> run_round(const std::vector<unsigned>& order) {
    unsigned finished = 0;
    bool progress = false;
    for (unsigned i : order) {
        Thread& next = block->threads[i];
        if (next.state != State::running) continue;
        to_thread(next);
        finished += next.state == State::finished;
        progress = true;
    }
    return {finished, progress};
}

UNSANITIZED inline void shuffle_order(std::vector<unsigned>& order) {
    for (size_t i = order.size(); i > 1; i--) {
        block->random = block->random * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(order[i - 1], order[(block->random >> 33) % i]);
    }
}

UNSANITIZED inline void start_threads() {
    for (size_t i = 0; i < block->threads.size(); i++) {
        Thread& t = block->threads[i];
        t.state = State::running;
        t.index = {unsigned(i), 0, 0};
        t.fake_stack = nullptr;
        fresh_stack(t.stack, STACK);
        void** top = reinterpret_cast<void**>(t.stack + STACK) - 3;  // as the ABI aligns it at a function's entry
        *--top = reinterpret_cast<void*>(run_kernel);
        for (int saved_register = 0; saved_register < 6; saved_register++) *--top = nullptr;
        t.stack_pointer = top;
        t.fiber = new_fiber();
    }
}

UNSANITIZED inline void run_block(Schedule schedule) {
    std::vector<unsigned> order(block->threads.size());
    for (unsigned i = 0; i < order.size(); i++) {
        order[i] = schedule == Schedule::reverse ? unsigned(order.size()) - 1 - i : i;
    }
    start_threads();
    size_t live = order.size();
    while (live && block->error.empty()) {
        if (schedule == Schedule::random) shuffle_order(order);
        const auto [finished, ran] = run_round(order);
        live -= finished;
        if (!finish_warps() && !ran && live) open_barrier();
    }
    for (const SharedArray& array : block->shared) free(array.memory);
    block->shared.clear();
}

inline char* map_stacks(size_t threads, char* where) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (where ? MAP_FIXED : 0);
    return static_cast<char*>(mmap(where, (STACK + GUARD) * threads, PROT_READ | PROT_WRITE, flags, -1, 0));
}

// Runs `kernel` for every thread of `blocks` x `threads`; the first error, or "". The fibers of all blocks are kept to
// the end, as ThreadSanitizer would take a reused one for the same thread and miss races between blocks.
inline std::string launch(unsigned blocks, unsigned threads, Schedule schedule, uint64_t seed,
                          const std::function<void()>& kernel) {
    const Unseen unseen;
    constexpr size_t key_size = 8;
    std::vector<char> barriers(blocks * key_size), end(key_size);
    std::vector<void*> fibers;
    Block current{};
    block = &current;
    current.threads.resize(threads);
    current.kernel = &kernel;
    current.end = end.data();
    current.scheduler_fiber = current_fiber();
    char* stacks = map_stacks(threads, nullptr);
    for (unsigned i = 0; i < threads; i++) {
        mprotect(stacks + (STACK + GUARD) * i, GUARD, PROT_NONE);
        current.threads[i].stack = stacks + (STACK + GUARD) * i + GUARD;
    }
    for (unsigned b = 0; b < blocks && current.error.empty(); b++) {
        current.index = {b, 0, 0};
        current.random = (seed + b) * 0x9E3779B97F4A7C15ull | 1u;
        current.barrier = barriers.data() + b * key_size;
        if (THREAD_SANITIZER) map_stacks(threads, stacks);  // it forgets what the last block's stacks held
        release(current.barrier);
        run_block(schedule);
        for (const Thread& t : current.threads) fibers.push_back(t.fiber);
    }
    acquire(current.end);
    for (void* fiber : fibers) delete_fiber(fiber);
    munmap(stacks, (STACK + GUARD) * threads);
    block = nullptr;
    return current.error;
}

}  // namespace emulator

#define threadIdx (emulator::thread->index)
#define blockIdx (emulator::block->index)

inline void __syncthreads(int line = __builtin_LINE()) { emulator::wait_at(emulator::State::at_barrier, line); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
    const unsigned lane = emulator::thread_number(*emulator::thread) % emulator::WARP_LANES;
    return emulator::shuffle(mask, value, lane ^ unsigned(lanes), line);
}

inline int atomicOr(int* address, int value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }
inline int atomicAnd(int* address, int value) { return __atomic_fetch_and(address, value, __ATOMIC_RELAXED); }
