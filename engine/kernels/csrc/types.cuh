// Number types and the one place that knows which compiler reads the kernels: NVRTC for GPUs, g++ for the CPU kernels
// and, with -DCUDA_EMULATOR, for the emulated GPU kernels. from_f rounds to nearest, ties to even.
#pragma once
#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define HD __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define SHARED(type, name, count) __shared__ type name[count]
#define NEG_INF __int_as_float(0xff800000)  // NVRTC has no INFINITY
using bf16 = __nv_bfloat16;
using fp16 = __half;
using uint32_t = unsigned;  // NVRTC has no <cstdint>

HD float to_f(float x) { return x; }
HD float to_f(bf16 x) { return __bfloat162float(x); }
HD float to_f(fp16 x) { return __half2float(x); }
template <class T>
HD T from_f(float x);
template <>
HD float from_f<float>(float x) {
    return x;
}
template <>
HD bf16 from_f<bf16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
HD fp16 from_f<fp16>(float x) {
    return __float2half_rn(x);
}

#else

#ifdef CUDA_EMULATOR
#include "emulator.h"
#endif
#include <cmath>
#include <cstdint>
#include <cstring>
#define HD inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define NEG_INF (-INFINITY)

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

HD uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
HD float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Conversions without branches, which compilers vectorise.
HD float to_f(float x) { return x; }
HD float to_f(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
HD float to_f(fp16 x) {
    const uint32_t magnitude = x.bits & 0x7fffu, sign = uint32_t(x.bits & 0x8000u) << 16;
    const uint32_t finite = bits_of(float_of(magnitude << 13) * 5.192296858534828e33f);  // 2^112: the exponent's bias
    return float_of(sign | (magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : finite));
}
template <class T>
HD T from_f(float x);
template <>
HD float from_f<float>(float x) {
    return x;
}
template <>
HD bf16 from_f<bf16>(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded)};
}
template <>
HD fp16 from_f<fp16>(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // 0.5's ulp is fp16's smallest
    uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
    rounded = magnitude >= 0x477ff000u ? 0x7c00u : rounded;  // from 65520 on
    return {uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00u : rounded))};
}

#endif
