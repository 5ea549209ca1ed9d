// What surrounds a linear layer's matrix products: bias and GELU, GeGLU (Shazeer 2020), and sums over rows for the
// gradients of biases. Each element is read and written once, 16 bytes at a time.
//
// A block's lanes stand on WARP neighbouring packs of columns and its warps on its rows in turn, so a thread's columns
// never change: it reads the bias once, and sums over rows need no other thread until the end. Such sums are made in
// groups of rows whose number depends on the number of rows alone, then over the groups by `sum_partials`, both in a
// fixed order: the same bits on every card. Matrices are contiguous, aligned to 16 bytes, of whole packs a row.
#pragma once
#include "common.cuh"
#include "gelu.cuh"

template <class T>
constexpr int PACK = 16 / sizeof(T);

using Four = Pack<float, 4>;

// What of a matrix [rows, width] block blockIdx.x works off: rows `row`, `row` + THREADS / WARP, ... below `end`, and
// PACK<T> columns from `column` on, if it is below `width`. `group` counts the blocks that share columns.
struct Place {
    int group, row, end, column;
};

template <class T, int THREADS>
__device__ __forceinline__ Place place_of_thread(int rows, int width, int group_rows) {
    constexpr int columns = WARP * PACK<T>;
    const int tiles = (width + columns - 1) / columns, group = blockIdx.x / tiles;
    const int first = group * group_rows, lane = threadIdx.x % WARP;
    const int end = first + group_rows < rows ? first + group_rows : rows;
    return {group, first + int(threadIdx.x) / WARP, end, int(blockIdx.x % tiles) * columns + lane * PACK<T>};
}

// Of a vector that may start at any element, as fp32.
template <class T>
__device__ __forceinline__ Pack<float, PACK<T>> load_bias(const T* bias) {
    Pack<T, PACK<T>> low;
    if (aligned(bias, 0)) {
        low = pack_at<T, PACK<T>>(bias);
    } else {
#pragma unroll
        for (int k = 0; k < PACK<T>; k++) low.v[k] = bias[k];
    }
    Pack<float, PACK<T>> wide;
#pragma unroll
    for (int k = 0; k < PACK<T>; k++) wide.v[k] = to_f(low.v[k]);
    return wide;
}

// Writes partial [groups, width], the sums of the block's rows, from each thread's own sums.
template <class T, int THREADS>
__device__ __forceinline__ void store_sums(const Pack<float, PACK<T>>& sum, const Place& at, int width,
                                           float* __restrict__ partial) {
    constexpr int fours = PACK<T> / 4, columns = WARP * PACK<T>, warps = THREADS / WARP;
    SHARED(Four, of_warps, THREADS * fours);
#pragma unroll
    for (int j = 0; j < fours; j++) {
        of_warps[threadIdx.x * fours + j] = {{sum.v[4 * j], sum.v[4 * j + 1], sum.v[4 * j + 2], sum.v[4 * j + 3]}};
    }
    __syncthreads();
    const int lane = threadIdx.x % WARP, tid = threadIdx.x;
    const int column = at.column - lane * PACK<T> + tid;
    if (tid >= columns || column >= width) return;
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < warps; w++) total += of_warps[(w * columns + tid) / 4].v[tid % 4];
    partial[(long long)at.group * width + column] = total;
}

// out = GELU(x + bias).
template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS) bias_gelu(const T* __restrict__ x, const T* __restrict__ bias,
                                                     T* __restrict__ out, int rows, int width, int group_rows) {
    constexpr int N = PACK<T>;
    const Place at = place_of_thread<T, THREADS>(rows, width, group_rows);
    if (at.column >= width) return;
    const Pack<float, N> b = load_bias(bias + at.column);
#pragma unroll 4
    for (int row = at.row; row < at.end; row += THREADS / WARP) {
        const long long i = (long long)row * width + at.column;
        Pack<T, N> pack = pack_at<T, N>(x + i);
#pragma unroll
        for (int k = 0; k < N; k++) pack.v[k] = from_f<T>(gelu_of(to_f(pack.v[k]) + b.v[k]));
        pack_at<T, N>(out + i) = pack;
    }
}

// grad_x, and partial [groups, width] sums of it in fp32.
template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS)
    bias_gelu_backward(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ bias,
                       T* __restrict__ grad_x, float* __restrict__ partial, int rows, int width, int group_rows) {
    constexpr int N = PACK<T>;
    const Place at = place_of_thread<T, THREADS>(rows, width, group_rows);
    Pack<float, N> sum{};
    if (at.column < width) {
        const Pack<float, N> b = load_bias(bias + at.column);
#pragma unroll 2
        for (int row = at.row; row < at.end; row += THREADS / WARP) {
            const long long i = (long long)row * width + at.column;
            const Pack<T, N> g = pack_at<T, N>(grad + i);
            Pack<T, N> pack = pack_at<T, N>(x + i);
#pragma unroll
            for (int k = 0; k < N; k++) {
                const float slope = to_f(g.v[k]) * gelu_slope(to_f(pack.v[k]) + b.v[k]);
                sum.v[k] += slope;
                pack.v[k] = from_f<T>(slope);
            }
            pack_at<T, N>(grad_x + i) = pack;
        }
    }
    store_sums<T, THREADS>(sum, at, width, partial);
}

// out [rows, width] = GELU of the first half of each row of x [rows, 2 width], times the second half.
template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS)
    geglu(const T* __restrict__ x, T* __restrict__ out, int rows, int width, int group_rows) {
    constexpr int N = PACK<T>;
    const Place at = place_of_thread<T, THREADS>(rows, width, group_rows);
    if (at.column >= width) return;
#pragma unroll 2
    for (int row = at.row; row < at.end; row += THREADS / WARP) {
        const long long i = (long long)row * width + at.column, value = i + (long long)row * width;
        Pack<T, N> pack = pack_at<T, N>(x + value);
        const Pack<T, N> gate = pack_at<T, N>(x + value + width);
#pragma unroll
        for (int k = 0; k < N; k++) pack.v[k] = from_f<T>(gelu_of(to_f(pack.v[k])) * to_f(gate.v[k]));
        pack_at<T, N>(out + i) = pack;
    }
}

// grad_x [rows, 2 width].
template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS) geglu_backward(const T* __restrict__ grad, const T* __restrict__ x,
                                                          T* __restrict__ grad_x, int rows, int width, int group_rows) {
    constexpr int N = PACK<T>;
    const Place at = place_of_thread<T, THREADS>(rows, width, group_rows);
    if (at.column >= width) return;
    for (int row = at.row; row < at.end; row += THREADS / WARP) {
        const long long i = (long long)row * width + at.column, value = i + (long long)row * width;
        const Pack<T, N> g = pack_at<T, N>(grad + i);
        Pack<T, N> pack = pack_at<T, N>(x + value), gate = pack_at<T, N>(x + value + width);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float v = to_f(pack.v[k]), slope = to_f(g.v[k]);
            pack.v[k] = from_f<T>(slope * to_f(gate.v[k]) * gelu_slope(v));
            gate.v[k] = from_f<T>(slope * gelu_of(v));
        }
        pack_at<T, N>(grad_x + value) = pack;
        pack_at<T, N>(grad_x + value + width) = gate;
    }
}

// partial [groups, width], sums of x over groups of rows.
template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS)
    column_sum(const T* __restrict__ x, float* __restrict__ partial, int rows, int width, int group_rows) {
    constexpr int N = PACK<T>;
    const Place at = place_of_thread<T, THREADS>(rows, width, group_rows);
    Pack<float, N> sum{};
    if (at.column < width) {
#pragma unroll 4
        for (int row = at.row; row < at.end; row += THREADS / WARP) {
            const Pack<T, N> pack = pack_at<T, N>(x + (long long)row * width + at.column);
#pragma unroll
            for (int k = 0; k < N; k++) sum.v[k] += to_f(pack.v[k]);
        }
    }
    store_sums<T, THREADS>(sum, at, width, partial);
}
