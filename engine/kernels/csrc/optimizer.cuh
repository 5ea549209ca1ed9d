// AdamW in one launch and LAMB in three over a table of chunks, whatever the number of tensors. One block a chunk.
//
// fp32 weights and moments; gradients of type G, read only; the new weights are written once more as type C in the same
// pass (copy may be null). An element whose scaled gradient isn't finite keeps its weight and moments and sets an
// integer flag. No float atomics: the same bits every time for the same chunks and alignment.
#pragma once
#include "common.cuh"

// Elements a thread moves at once: 16 bytes of a 16-bit type, 32 of fp32.
constexpr int OPTIMIZER_PACK = 8;

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
    if constexpr (N == 1) {
        return {{*from}};
    } else {
        return pack_at<T, N>(from);
    }
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
    if constexpr (N == 1) {
        *to = pack.v[0];
    } else {
        pack_at<T, N>(to) = pack;
    }
}

// As type C, rounded to nearest.
template <int N, class C>
__device__ __forceinline__ void store_low(C* to, const Pack<float, N>& pack) {
    Pack<C, N> low;
#pragma unroll
    for (int k = 0; k < N; k++) low.v[k] = from_f<C>(pack.v[k]);
    store(to, low);
}

// Calls body with the offsets of this thread's packs, then of its single elements, and their width as a type.
template <int N>
struct Width {
    static constexpr int value = N;
};
template <int THREADS, class Body>
__device__ __forceinline__ void for_elements(Split cut, int count, Body body) {
    constexpr int N = OPTIMIZER_PACK;
    for (int p = threadIdx.x; p < cut.packs; p += THREADS) body(cut.head + p * N, Width<N>{});
    for (int i = threadIdx.x; i < cut.head; i += THREADS) body(i, Width<1>{});
    for (int i = cut.tail + threadIdx.x; i < count; i += THREADS) body(i, Width<1>{});
}

struct Moments {
    float exp_avg, exp_avg_sq;
};

// The moments after a gradient; as they were, with the flag raised, where it isn't finite. Selects, no branches.
__device__ __forceinline__ Moments next_moments(float grad, Moments now, const AdamStep& step, bool& overflow) {
    const bool finite = is_finite(grad);
    Moments next = now;
    adam_moments(grad, next.exp_avg, next.exp_avg_sq, step);
    overflow |= !finite;
    return {finite ? next.exp_avg : now.exp_avg, finite ? next.exp_avg_sq : now.exp_avg_sq};
}

#define CHUNK_PARAMETERS                                                                              \
    const long long* __restrict__ begin, const int* __restrict__ size, const int* __restrict__ owner, \
        const float* __restrict__ weight_decay

#define ADAM_PARAMETERS                                                                                           \
    const float *__restrict__ grad_scale, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2, \
        float eps, float inv_correction1, float inv_sqrt_correction2

#define ADAM_STEP {beta1, one_minus_beta1, beta2, one_minus_beta2, eps, inv_correction1, inv_sqrt_correction2}

template <class G, class C, int THREADS>
__global__ void __launch_bounds__(THREADS)
    adamw(float* param, const G* __restrict__ grad, float* exp_avg, float* exp_avg_sq, C* copy, CHUNK_PARAMETERS,
          float lr, ADAM_PARAMETERS, int* __restrict__ nonfinite) {
    const AdamStep step = ADAM_STEP;
    const long long first = begin[blockIdx.x];
    const int count = size[blockIdx.x];
    const float decay = weight_decay[owner[blockIdx.x]], scale = *grad_scale;
    const Split cut = split<OPTIMIZER_PACK>(count, param + first, grad + first, exp_avg + first, exp_avg_sq + first,
                                            copy ? copy + first : nullptr);
    bool overflow = false;
    for_elements<THREADS>(cut, count, [&](int offset, auto width) {
        constexpr int N = decltype(width)::value;
        const long long i = first + offset;
        Pack<float, N> p = load<N>(param + i), m = load<N>(exp_avg + i), v = load<N>(exp_avg_sq + i);
        const Pack<G, N> g = load<N>(grad + i);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float scaled = to_f(g.v[k]) * scale;
            const Moments next = next_moments(scaled, {m.v[k], v.v[k]}, step, overflow);
            const float direction = adam_direction(p.v[k], next.exp_avg, next.exp_avg_sq, decay, step);
            p.v[k] = is_finite(scaled) ? p.v[k] - lr * direction : p.v[k];
            m.v[k] = next.exp_avg;
            v.v[k] = next.exp_avg_sq;
        }
        store(param + i, p);
        store(exp_avg + i, m);
        store(exp_avg_sq + i, v);
        if (copy) store_low(copy + i, p);
    });
    if (overflow) atomicOr(nonfinite, 1);
}

// First launch of LAMB: moments, and partial [C], the squared norms of the weights and of the update direction.
template <class G, int THREADS>
__global__ void __launch_bounds__(THREADS)
    lamb_moments(const float* param, const G* __restrict__ grad, float* exp_avg, float* exp_avg_sq, CHUNK_PARAMETERS,
                 ADAM_PARAMETERS, Sums* __restrict__ partial, int* __restrict__ nonfinite) {
    const AdamStep step = ADAM_STEP;
    const long long first = begin[blockIdx.x];
    const int count = size[blockIdx.x];
    const float decay = weight_decay[owner[blockIdx.x]], scale = *grad_scale;
    const Split cut = split<OPTIMIZER_PACK>(count, param + first, grad + first, exp_avg + first, exp_avg_sq + first);
    Sums squares{0.f, 0.f};
    bool overflow = false;
    for_elements<THREADS>(cut, count, [&](int offset, auto width) {
        constexpr int N = decltype(width)::value;
        const long long i = first + offset;
        const Pack<float, N> p = load<N>(param + i);
        Pack<float, N> m = load<N>(exp_avg + i);
        Pack<float, N> v = load<N>(exp_avg_sq + i);
        const Pack<G, N> g = load<N>(grad + i);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float scaled = to_f(g.v[k]) * scale;
            squares.a += p.v[k] * p.v[k];
            const Moments next = next_moments(scaled, {m.v[k], v.v[k]}, step, overflow);
            const float direction = adam_direction(p.v[k], next.exp_avg, next.exp_avg_sq, decay, step);
            squares.b += is_finite(scaled) ? direction * direction : 0.f;
            m.v[k] = next.exp_avg;
            v.v[k] = next.exp_avg_sq;
        }
        store(exp_avg + i, m);
        store(exp_avg_sq + i, v);
    });
    squares = block_sums<THREADS>(squares);
    if (threadIdx.x == 0) partial[blockIdx.x] = squares;
    if (overflow) atomicOr(nonfinite, 1);
}

// The sum over a segment's chunks first[s] .. first[s + 1], in every thread; one block a segment.
template <int THREADS>
__device__ __forceinline__ Sums segment_sums(const Sums* __restrict__ partial, const int* __restrict__ first) {
    Sums squares{0.f, 0.f};
    for (int c = first[blockIdx.x] + threadIdx.x; c < first[blockIdx.x + 1]; c += THREADS) {
        squares.a += partial[c].a;
        squares.b += partial[c].b;
    }
    return block_sums<THREADS>(squares);
}

// Second launch: ratio [S].
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    lamb_ratios(const Sums* __restrict__ partial, const int* __restrict__ first, const float* __restrict__ weight_decay,
                const bool* __restrict__ trust, float trust_clamp, bool nvlamb, float* __restrict__ ratio) {
    const int segment = blockIdx.x;
    const Sums squares = segment_sums<THREADS>(partial, first);
    if (threadIdx.x != 0) return;
    const bool scaled = trust[segment] && (nvlamb || weight_decay[segment] != 0.f);
    ratio[segment] = scaled ? trust_ratio(sqrtf(squares.a), sqrtf(squares.b), trust_clamp) : 1.f;
}

// Instead of it where segments are parts of split parameters: squares [S, 2], to be summed over the ranks.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    lamb_squares(const Sums* __restrict__ partial, const int* __restrict__ first, double* __restrict__ squares) {
    const Sums sums = segment_sums<THREADS>(partial, first);
    if (threadIdx.x != 0) return;
    squares[2 * blockIdx.x] = sums.a;
    squares[2 * blockIdx.x + 1] = sums.b;
}

// Third launch: the weights. Gradients are read again only where the first launch met one that isn't finite.
template <class G, class C, int THREADS>
__global__ void __launch_bounds__(THREADS)
    lamb_update(float* param, const G* __restrict__ grad, const float* exp_avg, const float* exp_avg_sq, C* copy,
                CHUNK_PARAMETERS, float lr, ADAM_PARAMETERS, const float* __restrict__ ratio,
                const int* __restrict__ nonfinite) {
    const AdamStep step = ADAM_STEP;
    const long long first = begin[blockIdx.x];
    const int count = size[blockIdx.x], segment = owner[blockIdx.x];
    const float decay = weight_decay[segment], rate = lr * ratio[segment], scale = *grad_scale;
    const bool check = *nonfinite != 0;
    const Split cut =
        split<OPTIMIZER_PACK>(count, param + first, exp_avg + first, exp_avg_sq + first, copy ? copy + first : nullptr);
    for_elements<THREADS>(cut, count, [&](int offset, auto width) {
        constexpr int N = decltype(width)::value;
        const long long i = first + offset;
        Pack<float, N> p = load<N>(param + i);
        const Pack<float, N> m = load<N>(exp_avg + i), v = load<N>(exp_avg_sq + i);
#pragma unroll
        for (int k = 0; k < N; k++) {
            if (check && !is_finite(to_f(grad[i + k]) * scale)) continue;
            p.v[k] -= rate * adam_direction(p.v[k], m.v[k], v.v[k], decay, step);
        }
        store(param + i, p);
        if (copy) store_low(copy + i, p);
    });
}
