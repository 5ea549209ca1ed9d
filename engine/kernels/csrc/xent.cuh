// Softmax cross-entropy: loss, hit and, in place of the logits, the gradient. One block a row, one barrier a row.
//
// xent_streaming reads the row twice and writes it once (online softmax: Milakov & Gimelshein 2018).
// xent_registers keeps the row in registers: one read, one exponential, one write.
// Rows may start at any element. A target outside [0, V) that isn't ignore_index is never used as an address: the row's
// loss and gradient become NaN, and a flag tells it without a host synchronisation.
#pragma once
#include "common.cuh"

struct XentArgs {
    const long long* target;  // [R]
    const float* scale;       // []
    float* loss;              // [R]
    bool* hit;                // [R]
    int* in_range;            // [] or null, for all rows
    long long ignore_index;
    float label_smoothing;
    bool gradient;
    int classes;  // V
};

// What one pass over some of a row's logits finds.
struct RowPart {
    SoftmaxPart softmax;
    float rest;  // sum of (x - target's logit)
    int beaten;  // logits that come before the target's
};

__device__ __forceinline__ RowPart empty_part() { return {{NEG_INF, 0.f}, 0.f, 0}; }

__device__ __forceinline__ RowPart merge(RowPart a, RowPart b) {
    return {merge(a.softmax, b.softmax), a.rest + b.rest, a.beaten + b.beaten};
}

__device__ __forceinline__ RowPart warp_merge(RowPart part) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        RowPart other;
        other.softmax.max = __shfl_xor_sync(0xffffffffu, part.softmax.max, lanes);
        other.softmax.sum = __shfl_xor_sync(0xffffffffu, part.softmax.sum, lanes);
        other.rest = __shfl_xor_sync(0xffffffffu, part.rest, lanes);
        other.beaten = __shfl_xor_sync(0xffffffffu, part.beaten, lanes);
        part = merge(part, other);
    }
    return part;
}

// The row's findings, in every thread. Its barrier also ends every read of the target's logit.
template <int THREADS>
__device__ __forceinline__ RowPart block_merge(RowPart part) {
    SHARED(RowPart, partial, THREADS / WARP);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    part = warp_merge(part);
    if (lane == 0) partial[warp] = part;
    __syncthreads();
    return warp_merge(lane < THREADS / WARP ? partial[lane] : empty_part());
}

// Adds `N` neighbouring logits, the first of which is class `first`, to what a thread has found.
template <class T, int N>
__device__ __forceinline__ void accumulate(RowPart& part, const Pack<T, N>& logits, int first, float target_logit,
                                           int target) {
    float max = part.softmax.max;
#pragma unroll
    for (int k = 0; k < N; k++) {
        const float x = to_f(logits.v[k]);
        max = x > max ? x : max;
        part.rest += x - target_logit;
        part.beaten += beats_target(x, first + k, target_logit, target);
    }
    const float shift = softmax_shift(max);
    float sum = part.softmax.sum * fexp(part.softmax.max - shift);
#pragma unroll
    for (int k = 0; k < N; k++) sum += fexp(to_f(logits.v[k]) - shift);
    part.softmax = {max, sum};
}

template <class T, int N>
__device__ __forceinline__ void to_gradient(Pack<T, N>& logits, int first, int target, const XentRow& row) {
#pragma unroll
    for (int k = 0; k < N; k++) logits.v[k] = from_f<T>(xent_grad(to_f(logits.v[k]), first + k == target, row));
}

template <int THREADS, class T>
__device__ __forceinline__ void fill_row(T* row, int classes, float value) {
    for (int i = threadIdx.x; i < classes; i += THREADS) row[i] = from_f<T>(value);
}

// Deals with a row that has no class to score, ignored or out of range; false for every other row.
template <int THREADS, class T>
__device__ __forceinline__ bool without_target(T* row, long long target, const XentArgs& args) {
    const bool ignored = target == args.ignore_index;
    if (!ignored && target >= 0 && target < args.classes) return false;
    const float value = ignored ? 0.f : nanf("");
    if (args.gradient) fill_row<THREADS>(row, args.classes, value);
    if (threadIdx.x == 0) {
        args.loss[blockIdx.x] = value;
        args.hit[blockIdx.x] = false;
        if (!ignored && args.in_range) atomicAnd(args.in_range, 0);
    }
    return true;
}

__device__ __forceinline__ void store_scores(const RowPart& row, float target_logit, const XentArgs& args) {
    if (threadIdx.x != 0) return;
    args.loss[blockIdx.x] = xent_loss(row.softmax, target_logit, row.rest, args.label_smoothing, args.classes);
    args.hit[blockIdx.x] = row.beaten == 0;
}

template <class T, int THREADS>
__device__ __forceinline__ void xent_streaming_row(T* x, const XentArgs& args) {
    constexpr int N = 16 / sizeof(T);
    if (without_target<THREADS>(x, args.target[blockIdx.x], args)) return;
    const int target = int(args.target[blockIdx.x]), tid = threadIdx.x;
    const float target_logit = to_f(x[target]);
    const Split cut = split<N>(args.classes, x);

    RowPart part = empty_part();
    for (int i = tid; i < cut.head; i += THREADS) accumulate(part, Pack<T, 1>{{x[i]}}, i, target_logit, target);
    for (int p = tid; p < cut.packs; p += THREADS) {
        const int first = cut.head + p * N;
        accumulate(part, pack_at<T, N>(x + first), first, target_logit, target);
    }
    for (int i = cut.tail + tid; i < args.classes; i += THREADS) {
        accumulate(part, Pack<T, 1>{{x[i]}}, i, target_logit, target);
    }
    part = block_merge<THREADS>(part);
    store_scores(part, target_logit, args);
    if (!args.gradient) return;

    const XentRow row = xent_row(part.softmax, args.label_smoothing, args.classes, *args.scale);
    for (int i = tid; i < cut.head; i += THREADS) x[i] = from_f<T>(xent_grad(to_f(x[i]), i == target, row));
    for (int p = tid; p < cut.packs; p += THREADS) {
        const int first = cut.head + p * N;
        Pack<T, N> logits = pack_at<T, N>(x + first);
        to_gradient(logits, first, target, row);
        pack_at<T, N>(x + first) = logits;
    }
    for (int i = cut.tail + tid; i < args.classes; i += THREADS) {
        x[i] = from_f<T>(xent_grad(to_f(x[i]), i == target, row));
    }
}

// A row in registers: a thread has PACKS of its packs and at most one of its single elements.
template <class T, int THREADS, int PACKS>
struct Kept {
    static constexpr int N = 16 / sizeof(T);
    Split cut;
    int single;  // the place of the single element; `classes` or more without one

    // Calls body(j, class) for each pack j < PACKS of the thread, `class` being that of its first logit.
    template <class Body>
    __device__ __forceinline__ void for_packs(Body body) const {
#pragma unroll
        for (int j = 0; j < PACKS; j++) {
            const int p = threadIdx.x + j * THREADS;
            if (p < cut.packs) body(j, cut.head + p * N);
        }
    }
};

// Whether one of a thread's logits comes before the target's or is NaN, read again.
template <class T, int THREADS, int PACKS>
__device__ __forceinline__ bool beaten(const Kept<T, THREADS, PACKS>& kept, const T* x, int classes, float target_logit,
                                       int target) {
    constexpr int N = 16 / sizeof(T);
    bool ahead = kept.single < classes && beats_target(to_f(x[kept.single]), kept.single, target_logit, target);
    for (int p = threadIdx.x; p < kept.cut.packs; p += THREADS) {
        const int first = kept.cut.head + p * N;
        for (int k = 0; k < N; k++) ahead |= beats_target(to_f(x[first + k]), first + k, target_logit, target);
    }
    return ahead;
}

// For rows of at most THREADS * PACKS packs. What is kept are exponentials relative to the thread's own maximum: each
// logit is read, raised and written once.
template <class T, int THREADS, int PACKS>
__device__ __forceinline__ void xent_registers_row(T* x, const XentArgs& args) {
    constexpr int N = 16 / sizeof(T);
    if (without_target<THREADS>(x, args.target[blockIdx.x], args)) return;
    const int target = int(args.target[blockIdx.x]), tid = threadIdx.x;
    const float target_logit = to_f(x[target]);
    const Split cut = split<N>(args.classes, x);
    const Kept<T, THREADS, PACKS> kept{cut, tid < cut.head ? tid : cut.tail + tid - cut.head};
    const bool has_single = kept.single < args.classes;

    Pack<T, N> logits[PACKS];
    kept.for_packs([&](int j, int first) { logits[j] = pack_at<T, N>(x + first); });
    float e_single = has_single ? to_f(x[kept.single]) : NEG_INF;
    float max = NEG_INF, rest = has_single ? e_single - target_logit : 0.f;
    kept.for_packs([&](int j, int) {
#pragma unroll
        for (int k = 0; k < N; k++) max = fmaxf(max, to_f(logits[j].v[k]));
    });
    max = fmaxf(max, e_single);
    if (args.label_smoothing > 0.f) {
        kept.for_packs([&](int j, int) {
#pragma unroll
            for (int k = 0; k < N; k++) rest += to_f(logits[j].v[k]) - target_logit;
        });
    }
    const float shift = softmax_shift(max);
    Pack<float, N> e[PACKS];
    e_single = fexp(e_single - shift);
    float sum = e_single;
    kept.for_packs([&](int j, int) {
#pragma unroll
        for (int k = 0; k < N; k++) {
            e[j].v[k] = fexp(to_f(logits[j].v[k]) - shift);
            sum += e[j].v[k];
        }
    });
    // A thread's own equal maximum is rare, and so is NaN.
    const bool unclear = max == target_logit || sum != sum;
    const bool ahead = unclear ? beaten(kept, x, args.classes, target_logit, target) : max > target_logit;
    const RowPart part = block_merge<THREADS>(RowPart{{max, sum}, rest, ahead});
    store_scores(part, target_logit, args);
    if (!args.gradient) return;

    const XentRow row = xent_row(part.softmax, args.label_smoothing, args.classes, *args.scale);
    XentRow own = row;
    own.inv_sum *= fexp(max - softmax_shift(row.max));
    kept.for_packs([&](int j, int first) {
#pragma unroll
        for (int k = 0; k < N; k++) logits[j].v[k] = from_f<T>(xent_grad_of_exp(e[j].v[k], false, own));
        pack_at<T, N>(x + first) = logits[j];
        if (first <= target && target < first + N) x[target] = from_f<T>(xent_grad(target_logit, true, row));
    });
    if (has_single) x[kept.single] = from_f<T>(xent_grad_of_exp(e_single, kept.single == target, own));
}

#define XENT_PARAMETERS                                                                                            \
    T *logits, long long stride, int classes, const long long *target, const float *scale, float *loss, bool *hit, \
        int *in_range, long long ignore_index, float label_smoothing, bool gradient

template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS) xent_streaming(XENT_PARAMETERS) {
    const XentArgs args{target, scale, loss, hit, in_range, ignore_index, label_smoothing, gradient, classes};
    xent_streaming_row<T, THREADS>(logits + blockIdx.x * stride, args);
}

template <class T, int THREADS, int PACKS>
__global__ void __launch_bounds__(THREADS) xent_registers(XENT_PARAMETERS) {
    const XentArgs args{target, scale, loss, hit, in_range, ignore_index, label_smoothing, gradient, classes};
    xent_registers_row<T, THREADS, PACKS>(logits + blockIdx.x * stride, args);
}
