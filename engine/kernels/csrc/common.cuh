// What the GPU kernels share: 16-byte access to rows that start anywhere, and sums over a block in a fixed order.
#pragma once
#include "math.cuh"

constexpr int WARP = 32;

// `N` neighbouring elements, moved in units of 16 bytes.
template <class T, int N>
struct alignas(16) Pack {
    T v[N];
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N>& pack_at(T* elements) {
    return *reinterpret_cast<Pack<T, N>*>(elements);
}
template <class T, int N>
__device__ __forceinline__ const Pack<T, N>& pack_at(const T* elements) {
    return *reinterpret_cast<const Pack<T, N>*>(elements);
}

// `N` neighbouring elements in one load where they start at 16 bytes, which `whole` says.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* elements, bool whole) {
    if (whole) return pack_at<T, N>(elements);
    Pack<T, N> pack;
#pragma unroll
    for (int k = 0; k < N; k++) pack.v[k] = elements[k];
    return pack;
}

// Whether `pointer + head` starts a 16-byte unit; a null pointer stands for no array.
template <class T>
__device__ __forceinline__ bool aligned(const T* pointer, int head) {
    return !pointer || (reinterpret_cast<size_t>(pointer) + head * sizeof(T)) % 16 == 0;
}

// A range cut into `head` single elements up to a 16-byte boundary, whole packs, and single elements from `tail` on.
struct Split {
    int head, packs, tail;
};

// The cut after which every pointer is aligned; all elements single where no such cut is.
template <int N, class... Pointers>
__device__ __forceinline__ Split split(int count, Pointers... pointers) {
    for (int head = 0; head < N && head <= count; head++) {
        if ((aligned(pointers, head) && ...)) {
            const int packs = (count - head) / N;
            return {head, packs, head + packs * N};
        }
    }
    return {count, 0, count};
}

// Sum over the warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

struct Sums {
    float a, b;
};

// Sums over a block of THREADS, in every thread; once in a kernel, as its shared memory isn't guarded against reuse.
template <int THREADS>
__device__ __forceinline__ Sums block_sums(Sums x) {
    SHARED(Sums, partial, THREADS / WARP);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = {warp_sum(x.a), warp_sum(x.b)};
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = lane < THREADS / WARP ? partial[lane] : Sums{0.f, 0.f};
    return {warp_sum(x.a), warp_sum(x.b)};
}
