// What surrounds a linear layer's matrix products: bias and GELU behind it, and their gradients, a pass each.
//
// The matrix product comes without its bias; GELU (Hendrycks and Gimpel 2016) is the exact one, x * Phi(x). The sums
// over rows are made in groups whose number doesn't depend on the number of threads, so they have the same bits for
// all.
#include "../math.cuh"
#include "row_sums.h"

namespace {

// Odd functions of x as x * P(x^2) on [-5, 5], constant beyond: the distribution function of the normal distribution
// less 1/2, within 1.1e-6 everywhere, and the derivative of GELU less 1/2, within 7e-6 (near 5, where it is cut off).
// The coefficients make the largest error smallest (Lawson's algorithm), highest power of 2 x^2 / 25 - 1 first. Neither
// needs an exponential or a division, which would cost more time than the memory does.
constexpr float kCumulative[] = {-1.372516963e-03f, 3.428215810e-03f, -3.287216803e-03f, 4.627759806e-03f,
                                 -1.062311201e-02f, 1.725613964e-02f, -2.347900909e-02f, 3.125852555e-02f,
                                 -4.040976326e-02f, 5.153484962e-02f, -7.029768687e-02f, 1.413636082e-01f};
constexpr float kSlope[] = {-4.721088951e-03f, 1.210695017e-02f, -1.024676128e-02f, 1.263827616e-02f,
                            -3.473135612e-02f, 5.658951972e-02f, -6.788693971e-02f, 7.820975732e-02f,
                            -8.445778936e-02f, 8.071876207e-02f, -7.178649543e-02f, 6.654369870e-02f,
                            -7.510933519e-02f, 1.421341071e-01f};

template <int n>
inline float half_plus_odd(const float (&coefficients)[n], float x) {
    float cut = x > 5.f ? 5.f : x;
    cut = cut < -5.f ? -5.f : cut;
    const float s = cut * cut * 0.08f - 1.f;
    float p = coefficients[0];
#pragma GCC unroll 16
    for (int i = 1; i < n; i++) p = p * s + coefficients[i];
    return 0.5f + cut * p;
}

template <class T>
void gelu_row(const T* x, const T* bias, T* out, int width) {
#pragma omp simd
    for (int i = 0; i < width; i++) {
        const float v = to_f(x[i]) + to_f(bias[i]);
        const float factor = v < -5.f ? -5.f : v;  // below, what is left of the distribution is the polynomial's error
        out[i] = from_f<T>(factor * half_plus_odd(kCumulative, v));
    }
}

template <class T>
void gelu_grad_row(const T* grad, const T* x, const T* bias, T* grad_x, float* sum, int width) {
#pragma omp simd
    for (int i = 0; i < width; i++) {
        const float v = to_f(x[i]) + to_f(bias[i]);
        const float slope = to_f(grad[i]) * half_plus_odd(kSlope, v);
        grad_x[i] = from_f<T>(slope);
        sum[i] += slope;
    }
}

template <class T>
void add_row(const T* x, float* sum, int width) {
#pragma omp simd
    for (int i = 0; i < width; i++) sum[i] += to_f(x[i]);
}

}  // namespace

extern "C" void gelu_bf16(const bf16* x, const bf16* bias, bf16* out, long long rows, int width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long long row = 0; row < rows; row++) gelu_row(x + row * width, bias, out + row * width, width);
}

extern "C" void gelu_backward_bf16(const bf16* grad, const bf16* x, const bf16* bias, bf16* grad_x, float* grad_bias,
                                   long long rows, int width, int threads) {
    sum_rows(rows, width, grad_bias, threads, [=](long long begin, long long end, float* part) {
        for (long long at = begin * width; at < end * width; at += width)
            gelu_grad_row(grad + at, x + at, bias, grad_x + at, part, width);
    });
}

extern "C" void column_sum_bf16(const bf16* x, float* sum, long long rows, int width, int threads) {
    sum_rows(rows, width, sum, threads, [=](long long begin, long long end, float* part) {
        for (long long row = begin; row < end; row++) add_row(x + row * width, part, width);
    });
}
