// What surrounds a linear layer's matrix products: bias and GELU behind it, or GeGLU (Shazeer 2020), and their
// gradients, a pass each.
//
// The matrix product comes without its bias; GELU (Hendrycks and Gimpel 2016) is the exact one, x * Phi(x). The sums
// over rows are made in groups whose number doesn't depend on the number of threads, so they have the same bits for
// all.
#include "../gelu.cuh"
#include "../math.cuh"
#include "gelu_lanes.h"
#include "row_sums.h"

namespace {

template <class T>
void gelu_row(const T* x, const T* bias, T* out, int width) {
#pragma omp simd
    for (int i = 0; i < width; i++) {
        const float v = to_f(x[i]) + to_f(bias[i]);
        out[i] = from_f<T>(gelu_of(v));
    }
}

template <class T>
void gelu_grad_row(const T* grad, const T* x, const T* bias, T* grad_x, float* sum, int width) {
#pragma omp simd
    for (int i = 0; i < width; i++) {
        const float v = to_f(x[i]) + to_f(bias[i]);
        const float slope = to_f(grad[i]) * gelu_slope(v);
        grad_x[i] = from_f<T>(slope);
        sum[i] += slope;
    }
}

// The first half of a row of x is activated, the second the gate.
// Phi(x) of the normal distribution, and its density: what GELU and its slope are made of.
struct Normal {
    float cumulative, density;
};

// In fp32, where `gelu_of` would be too coarse: within 8e-8 (Abramowitz and Stegun 1964, 7.1.26).
HD Normal normal(float x) {
    const float z = fabsf(x) * 0.70710678f, e = fexp(-z * z), t = 1.f / (1.f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float tail = 0.5f * p * t * e;
    return {x < 0.f ? tail : 1.f - tail, e * 0.39894228f};
}

HD float gelu_in(const float*, float x) { return x * normal(x).cumulative; }
HD float gelu_in(const bf16*, float x) { return gelu_of(x); }

// GELU and its slope at once.
struct Activation {
    float value, slope;
};
HD Activation activation_in(const float*, float x) {
    const Normal n = normal(x);
    return {x * n.cumulative, n.cumulative + x * n.density};
}
HD Activation activation_in(const bf16*, float x) { return {gelu_of(x), gelu_slope(x)}; }

template <class T>
void geglu_row(const T* x, T* out, int width) {
#pragma omp simd
    for (int i = 0; i < width; i++) out[i] = from_f<T>(gelu_in(x, to_f(x[i])) * to_f(x[width + i]));
}

template <class T>
void geglu_grad_row(const T* grad, const T* x, T* grad_x, int width) {
#pragma omp simd
    for (int i = 0; i < width; i++) {
        const float of_out = to_f(grad[i]);
        const Activation at = activation_in(x, to_f(x[i]));
        grad_x[i] = from_f<T>(of_out * to_f(x[width + i]) * at.slope);
        grad_x[width + i] = from_f<T>(of_out * at.value);
    }
}

template <class T>
void add_row(const T* x, float* sum, int width) {
#pragma omp simd
    for (int i = 0; i < width; i++) sum[i] += to_f(x[i]);
}

}  // namespace

extern "C" void gelu_bf16(const bf16* x, const bf16* bias, bf16* out, long long rows, int width, int threads) {
    const auto of_row = gelu_lanes_usable(width) ? gelu_row_lanes : gelu_row<bf16>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long long row = 0; row < rows; row++) of_row(x + row * width, bias, out + row * width, width);
}

extern "C" void gelu_backward_bf16(const bf16* grad, const bf16* x, const bf16* bias, bf16* grad_x, float* grad_bias,
                                   long long rows, int width, int threads) {
    const auto of_row = gelu_lanes_usable(width) ? gelu_grad_row_lanes : gelu_grad_row<bf16>;
    sum_rows(rows, width, grad_bias, threads, [=](long long begin, long long end, float* part) {
        for (long long at = begin * width; at < end * width; at += width)
            of_row(grad + at, x + at, bias, grad_x + at, part, width);
    });
}

// x, grad_x: [rows, 2 width]; out, grad: [rows, width].
template <class T, class Row>
void geglu(Row of_row, const T* x, T* out, long long rows, int width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long long row = 0; row < rows; row++) of_row(x + row * 2 * width, out + row * width, width);
}

template <class T, class Row>
void geglu_backward(Row of_row, const T* grad, const T* x, T* grad_x, long long rows, int width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long long row = 0; row < rows; row++)
        of_row(grad + row * width, x + row * 2 * width, grad_x + row * 2 * width, width);
}

#define GEGLU(NAME, T, ROW, GRAD_ROW)                                                                      \
    extern "C" void geglu_##NAME(const T* x, T* out, long long rows, int width, int threads) {             \
        geglu(ROW, x, out, rows, width, threads);                                                          \
    }                                                                                                      \
    extern "C" void geglu_backward_##NAME(const T* grad, const T* x, T* grad_x, long long rows, int width, \
                                          int threads) {                                                   \
        geglu_backward(GRAD_ROW, grad, x, grad_x, rows, width, threads);                                   \
    }
GEGLU(fp32, float, geglu_row<float>, geglu_grad_row<float>)
GEGLU(bf16, bf16, (gelu_lanes_usable(width) ? geglu_row_lanes : geglu_row<bf16>),
      (gelu_lanes_usable(width) ? geglu_grad_row_lanes : geglu_grad_row<bf16>))

extern "C" void column_sum_bf16(const bf16* x, float* sum, long long rows, int width, int threads) {
    sum_rows(rows, width, sum, threads, [=](long long begin, long long end, float* part) {
        for (long long row = begin; row < end; row++) add_row(x + row * width, part, width);
    });
}
