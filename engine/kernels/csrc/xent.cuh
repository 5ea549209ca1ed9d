// Softmax cross-entropy: loss, hit and, in place of the logits, the gradient. One block a row, one barrier a row.
//
// xent_streaming reads the row twice and writes it once (online softmax: Milakov & Gimelshein 2018).
// xent_registers keeps the row in registers: one read, one write.
// Rows may start at any element. A target outside [0, V) that isn't ignore_index is never used as an address: the row's
// loss and gradient become NaN, which the caller's check for overflow sees without a host synchronisation.
#pragma once
#include "common.cuh"

struct XentArgs {
    const long long* target;  // [R]
    const float* scale;       // []
    float* loss;              // [R]
    bool* hit;                // [R]
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

// For rows of at most THREADS * PACKS packs: a thread keeps PACKS of them and at most one of the single elements.
template <class T, int THREADS, int PACKS>
__device__ __forceinline__ void xent_registers_row(T* x, const XentArgs& args) {
    constexpr int N = 16 / sizeof(T);
    if (without_target<THREADS>(x, args.target[blockIdx.x], args)) return;
    const int target = int(args.target[blockIdx.x]), tid = threadIdx.x;
    const float target_logit = to_f(x[target]);
    const Split cut = split<N>(args.classes, x);
    const int single = tid < cut.head ? tid : cut.tail + tid - cut.head;
    const bool has_single = single < args.classes;

    Pack<T, N> kept[PACKS];
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const int p = tid + j * THREADS;
        if (p < cut.packs) kept[j] = pack_at<T, N>(x + cut.head + p * N);
    }
    Pack<T, 1> kept_single = {{has_single ? x[single] : from_f<T>(0.f)}};

    RowPart part = empty_part();
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const int p = tid + j * THREADS;
        if (p < cut.packs) accumulate(part, kept[j], cut.head + p * N, target_logit, target);
    }
    if (has_single) accumulate(part, kept_single, single, target_logit, target);
    part = block_merge<THREADS>(part);
    store_scores(part, target_logit, args);
    if (!args.gradient) return;

    const XentRow row = xent_row(part.softmax, args.label_smoothing, args.classes, *args.scale);
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const int first = cut.head + (tid + j * THREADS) * N;
        if (tid + j * THREADS < cut.packs) {
            to_gradient(kept[j], first, target, row);
            pack_at<T, N>(x + first) = kept[j];
        }
    }
    if (has_single) x[single] = from_f<T>(xent_grad(to_f(kept_single.v[0]), single == target, row));
}

#define XENT_PARAMETERS                                                                                            \
    T *logits, long long stride, int classes, const long long *target, const float *scale, float *loss, bool *hit, \
        long long ignore_index, float label_smoothing, bool gradient

template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS) xent_streaming(XENT_PARAMETERS) {
    const XentArgs args{target, scale, loss, hit, ignore_index, label_smoothing, gradient, classes};
    xent_streaming_row<T, THREADS>(logits + blockIdx.x * stride, args);
}

template <class T, int THREADS, int PACKS>
__global__ void __launch_bounds__(THREADS) xent_registers(XENT_PARAMETERS) {
    const XentArgs args{target, scale, loss, hit, ignore_index, label_smoothing, gradient, classes};
    xent_registers_row<T, THREADS, PACKS>(logits + blockIdx.x * stride, args);
}
