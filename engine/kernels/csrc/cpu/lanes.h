// Vectors of sixteen fp32 numbers on CPUs with AVX512-BF16: loads, stores, and what kernels make of them by hand.
//
// What follows the #include of this header is compiled for such CPUs, so a source includes it last, keeps to HAS_LANES,
// and is only called where `lanes_usable`.
#pragma once
#include "../dropout.cuh"
#include "../math.cuh"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 10 : __GNUC__ >= 10)
#define HAS_LANES
inline bool lanes_usable() {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#include <immintrin.h>

namespace {

constexpr int kLanes = 16;

using Lanes = __m512;
using Index = long long;

inline Lanes load_bf16(const bf16* x) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store_bf16(bf16* to, Lanes x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }

inline Lanes exp_lanes(Lanes x) {
    const Lanes y = _mm512_max_ps(x, _mm512_set1_ps(-104.f));
    const Lanes n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)), 8);
    Lanes r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), y);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    Lanes p = _mm512_set1_ps(1.3981999507e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
    return _mm512_scalef_ps(p, n);
}

inline __m512i hash_lanes(__m512i x) {
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x7feb352d));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(int(0x846ca68bu)));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

// Which of sixteen (row key, column) elements stay; `columns` are already multiplied (see dropout.cuh).
inline __mmask16 kept(__m512i keys, __m512i columns, const Dropout& d) {
    const __m512i hashes = hash_lanes(_mm512_xor_si512(keys, columns));
    return _mm512_cmpge_epu32_mask(hashes, _mm512_set1_epi32(int(d.threshold)));
}

inline __m512i column_products(int first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mullo_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(first)), _mm512_set1_epi32(int(0x9e3779b9u)));
}

// Sixteen rows of sixteen 32-bit elements turn into their columns.
inline void transpose_lanes(__m512i (&x)[kLanes]) {
    __m512i y[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    // x[4 i + j] has in its 128-bit lane l column 4 l + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i low = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88),
                      high = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
        y[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
        y[4 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
        y[8 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        y[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) x[i] = y[i];
}

}  // namespace
#else
inline bool lanes_usable() { return false; }
#endif
