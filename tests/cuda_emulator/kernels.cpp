// The kernels of engine/kernels/csrc, built for the emulator and launched by name with the arguments of cuLaunchKernel:
// one pointer a parameter.
#include <map>
#include <memory>
#include <tuple>

#include "activation.cuh"
#include "column_sum.cuh"
#include "layer_norm.cuh"
#include "norm.cuh"
#include "optimizer.cuh"
#include "xent.cuh"

namespace {

using Body = std::function<void()>;
using Kernel = std::function<Body(void**)>;

template <class... P, size_t... I>
Body call_of(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    return [=, values = std::tuple<P...>(*static_cast<P*>(arguments[I])...)] { std::apply(kernel, values); };
}

template <class... P>
Kernel kernel(void (*function)(P...)) {
    return [=](void** arguments) { return call_of(function, arguments, std::index_sequence_for<P...>{}); };
}

#define ENTRY(...) {#__VA_ARGS__, kernel(__VA_ARGS__)}
#define XENT(T) ENTRY(xent_streaming<T, 256>), ENTRY(xent_streaming<T, 1024>), ENTRY(xent_registers<T, 1024, 4>)
#define GRADIENT(G) ENTRY(squared_norms<G, 256>), ENTRY(lamb_moments<G, 256>)
#define GATED(T) ENTRY(geglu<T, 256>), ENTRY(geglu_backward<T, 256>)
#define ACTIVATION(T) ENTRY(bias_gelu<T, 256>), ENTRY(bias_gelu_backward<T, 256>), ENTRY(column_sum<T, 256>)
#define LAYER_NORM(T, TEAM, PACKS) \
    ENTRY(layer_norm<T, 128, TEAM, PACKS>), ENTRY(layer_norm_backward<T, 128, TEAM, PACKS>)
#define LAYER_NORMS(T)                                                                       \
    LAYER_NORM(T, 32, 2), LAYER_NORM(T, 32, 3), LAYER_NORM(T, 32, 4), LAYER_NORM(T, 128, 2), \
        ENTRY(sum_partials<T, 1024>)
#define UPDATE(G, C) ENTRY(adamw<G, C, 256>), ENTRY(lamb_update<G, C, 256>)

// FEW_KERNELS keeps the builds short that only look for races and stray accesses.
const std::map<std::string, Kernel>& kernels() {
    static const std::map<std::string, Kernel> table{
#ifdef FEW_KERNELS
        ENTRY(xent_streaming<bf16, 256>),
        ENTRY(xent_registers<float, 1024, 4>),
        LAYER_NORM(bf16, 32, 2),
        LAYER_NORM(float, 128, 2),
        ENTRY(sum_partials<float, 1024>),
#else
        LAYER_NORMS(float),
        LAYER_NORMS(bf16),
        LAYER_NORMS(fp16),
        ENTRY(xent_registers<float, 1024, 8>),
        XENT(float),
        XENT(bf16),
        XENT(fp16),
        ACTIVATION(fp16),
        GATED(fp16),
        ENTRY(column_sum<float, 256>),
        GRADIENT(float),
        GRADIENT(fp16),
        UPDATE(float, bf16),
        UPDATE(float, fp16),
        UPDATE(bf16, fp16),
        UPDATE(fp16, bf16),
        UPDATE(fp16, fp16),
#endif
        ACTIVATION(bf16),
        GATED(bf16),
        GRADIENT(bf16),
        UPDATE(bf16, bf16),
        ENTRY(lamb_ratios<256>),
        ENTRY(lamb_squares<256>),
        ENTRY(norm_of_chunks<1024>),
    };
    return table;
}

}  // namespace

extern "C" bool has_kernel(const char* name) { return kernels().count(name) > 0; }

// Returns what went wrong, or "".
extern "C" const char* emulate(const char* name, unsigned blocks, unsigned threads, void** arguments, int schedule,
                               unsigned long long seed) {
    static std::string error;
    const auto found = kernels().find(name);
    if (found == kernels().end()) {
        error = std::string("no kernel ") + name;
    } else {
        error = emulator::launch(blocks, threads, emulator::Schedule(schedule), seed, found->second(arguments));
    }
    return error.c_str();
}
