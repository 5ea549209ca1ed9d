// Global norm of the gradients in two launches: squared norms of chunks, then their sum. No atomics: the same bits
// every time for the same chunks and alignment.
#pragma once
#include "common.cuh"

// partial [C]: the sum of squares of chunk blockIdx.x.
template <class G, int THREADS>
__global__ void __launch_bounds__(THREADS)
    squared_norms(const G* __restrict__ grad, const long long* __restrict__ begin, const int* __restrict__ size,
                  float* __restrict__ partial) {
    constexpr int N = 16 / sizeof(G);
    const G* g = grad + begin[blockIdx.x];
    const int count = size[blockIdx.x], tid = threadIdx.x;
    const Split cut = split<N>(count, g);
    float sum = 0.f;
    for (int i = tid; i < cut.head; i += THREADS) sum += to_f(g[i]) * to_f(g[i]);
    for (int p = tid; p < cut.packs; p += THREADS) {
        const Pack<G, N> pack = pack_at<G, N>(g + cut.head + p * N);
#pragma unroll
        for (int k = 0; k < N; k++) sum += to_f(pack.v[k]) * to_f(pack.v[k]);
    }
    for (int i = cut.tail + tid; i < count; i += THREADS) sum += to_f(g[i]) * to_f(g[i]);
    const Sums total = block_sums<THREADS>({sum, 0.f});
    if (tid == 0) partial[blockIdx.x] = total.a;
}

// One block.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    norm_of_chunks(const float* __restrict__ partial, int chunks, float* __restrict__ norm) {
    float sum = 0.f;
    for (int c = threadIdx.x; c < chunks; c += THREADS) sum += partial[c];
    const Sums total = block_sums<THREADS>({sum, 0.f});
    if (threadIdx.x == 0) *norm = sqrtf(total.a);
}
