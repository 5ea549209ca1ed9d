// Dropout without a stored mask: whether an element stays is a hash of (seed, row, column), so the backward pass asks
// again instead of reading. The hash is "lowbias32" (Wellons 2018, Prospecting for Hash Functions). CPU and GPU kernels
// share it, so one seed gives both the same masks.
#pragma once
#include "types.cuh"

struct Dropout {
    uint32_t seed;
    uint32_t threshold;  // an element is dropped where its hash is below it; 0 keeps all
    float scale;         // 1 / (1 - probability)
};

HD uint32_t hash32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// The key of a row; `row` counts over all that is dropped under one seed.
HD uint32_t row_key(uint32_t seed, uint32_t row) { return hash32(seed ^ hash32(row + 0x9e3779b9u)); }

HD bool keeps(uint32_t key, uint32_t column, uint32_t threshold) {
    return hash32(key ^ column * 0x9e3779b9u) >= threshold;
}

// What the element is multiplied by.
HD float dropout_factor(uint32_t key, uint32_t column, const Dropout& d) {
    return keeps(key, column, d.threshold) ? d.scale : 0.f;
}

// Which of N neighbouring elements stay, the one in column `first` in bit 0.
template <int N>
HD uint32_t kept_bits(uint32_t key, uint32_t first, const Dropout& d) {
    if (!d.threshold) return ~0u;
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < N; k++) bits |= uint32_t(keeps(key, first + k, d.threshold)) << k;
    return bits;
}

// `dropout_factor` of element k among them.
HD float dropout_factor(uint32_t bits, int k, float scale) { return bits >> k & 1u ? scale : 0.f; }
