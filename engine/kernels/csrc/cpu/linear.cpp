// What surrounds a linear layer's matrix products: bias and GELU behind it, or GeGLU (Shazeer 2020), and their
// gradients, a pass each.
//
// The matrix product comes without its bias; GELU (Hendrycks and Gimpel 2016) is the exact one, x * Phi(x). The sums
// over rows are made in groups whose number doesn't depend on the number of threads, so they have the same bits for
// all.
#include "../gelu.cuh"
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
template <class T>
void geglu_row(const T* x, T* out, int width) {
#pragma omp simd
    for (int i = 0; i < width; i++) out[i] = from_f<T>(gelu_of(to_f(x[i])) * to_f(x[width + i]));
}

template <class T>
void geglu_grad_row(const T* grad, const T* x, T* grad_x, int width) {
#pragma omp simd
    for (int i = 0; i < width; i++) {
        const float v = to_f(x[i]), slope = to_f(grad[i]);
        grad_x[i] = from_f<T>(slope * to_f(x[width + i]) * gelu_slope(v));
        grad_x[width + i] = from_f<T>(slope * gelu_of(v));
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
extern "C" void geglu_bf16(const bf16* x, bf16* out, long long rows, int width, int threads) {
    const auto of_row = gelu_lanes_usable(width) ? geglu_row_lanes : geglu_row<bf16>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long long row = 0; row < rows; row++) of_row(x + row * 2 * width, out + row * width, width);
}

extern "C" void geglu_backward_bf16(const bf16* grad, const bf16* x, bf16* grad_x, long long rows, int width,
                                    int threads) {
    const auto of_row = gelu_lanes_usable(width) ? geglu_grad_row_lanes : geglu_grad_row<bf16>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long long row = 0; row < rows; row++)
        of_row(grad + row * width, x + row * 2 * width, grad_x + row * 2 * width, width);
}

extern "C" void column_sum_bf16(const bf16* x, float* sum, long long rows, int width, int threads) {
    sum_rows(rows, width, sum, threads, [=](long long begin, long long end, float* part) {
        for (long long row = begin; row < end; row++) add_row(x + row * width, part, width);
    });
}
