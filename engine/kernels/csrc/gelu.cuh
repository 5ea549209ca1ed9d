// GELU (Hendrycks and Gimpel 2016), the exact one, x * Phi(x), and its derivative, of numbers on GPUs and CPUs, or of
// a CPU's vectors.
#pragma once
#include "types.cuh"

// A NaN stays one.
HD float at_most(float x, float bound) { return x > bound ? bound : x; }
HD float at_least(float x, float bound) { return x < bound ? bound : x; }

template <int n, class V>
HD V half_plus_odd(const float (&coefficients)[n], V x) {
    const V cut = at_most(at_least(x, -5.f), 5.f);
    const V s = cut * cut * 0.08f - 1.f;
    V p = coefficients[0] - V{};  // a number alone would not turn into a vector
    UNROLL
    for (int i = 1; i < n; i++) p = p * s + coefficients[i];
    return 0.5f + cut * p;
}

// Odd functions of x as x * P(x^2) on [-5, 5], constant beyond: the distribution function of the normal distribution
// less 1/2, within 1.1e-6 everywhere, and the derivative of GELU less 1/2, within 7e-6 (near 5, where it is cut off).
// The coefficients make the largest error smallest (Lawson's algorithm), highest power of 2 x^2 / 25 - 1 first. Neither
// needs an exponential or a division, which would cost more time than the memory does.

// Below -5 what is left of the distribution is the polynomial's error, so its factor goes no further.
template <class V>
HD V gelu_of(V x) {
    constexpr float cumulative[] = {-1.372516963e-03f, 3.428215810e-03f, -3.287216803e-03f, 4.627759806e-03f,
                                    -1.062311201e-02f, 1.725613964e-02f, -2.347900909e-02f, 3.125852555e-02f,
                                    -4.040976326e-02f, 5.153484962e-02f, -7.029768687e-02f, 1.413636082e-01f};
    return at_least(x, -5.f) * half_plus_odd(cumulative, x);
}

template <class V>
HD V gelu_slope(V x) {
    constexpr float slope[] = {-4.721088951e-03f, 1.210695017e-02f, -1.024676128e-02f, 1.263827616e-02f,
                               -3.473135612e-02f, 5.658951972e-02f, -6.788693971e-02f, 7.820975732e-02f,
                               -8.445778936e-02f, 8.071876207e-02f, -7.178649543e-02f, 6.654369870e-02f,
                               -7.510933519e-02f, 1.421341071e-01f};
    return half_plus_odd(slope, x);
}
