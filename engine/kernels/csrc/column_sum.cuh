// The second launch of sums over rows: what blocks have summed, in a fixed order. No atomics: the same bits every time.
#pragma once
#include "common.cuh"

// partial [parts, width] to sum [width]. A block takes WARP columns; its warps share the parts.
template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS)
    sum_partials(const float* __restrict__ partial, int parts, int width, T* __restrict__ sum) {
    constexpr int WARPS = THREADS / WARP, STRIDE = WARP + 1;  // an odd stride keeps a column in different banks
    SHARED(float, sums, WARPS* STRIDE);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = blockIdx.x * WARP;
    float total = 0.f;
    if (first + lane < width) {
#pragma unroll 4
        for (int p = warp; p < parts; p += WARPS) total += partial[size_t(p) * width + first + lane];
    }
    sums[warp * STRIDE + lane] = total;
    __syncthreads();
    for (int column = warp; column < WARP; column += WARPS) {
        const float whole = warp_sum(lane < WARPS ? sums[lane * STRIDE + column] : 0.f);
        if (lane == 0 && first + column < width) sum[first + column] = from_f<T>(whole);
    }
}
