// Layer normalisation (Ba et al. 2016) with dropout and the residual sum around it: rows are read and written once.
//
// Forward: z = dropout(x) + residual, y = (z - mean) / std * weight + bias, out = dropout(y). Either dropout and the
// residual may be missing. Backward reads z, never a mask, and may add a gradient that z has from elsewhere. Sums over
// rows are made in groups whose number doesn't depend on the number of threads, so the result has the same bits for
// all.
#include <algorithm>

#include "../dropout.cuh"
#include "../math.cuh"
#include "row_sums.h"

namespace {

template <class T>
struct NormRows {
    long long rows;
    int width;
    float eps;
    Dropout inner, outer;
    const T *x, *residual, *weight, *bias;
    T *z, *out;
    float *mean, *inv_std;
};

template <class T>
float load_sum(const NormRows<T>& n, long long row, float* z) {
    const T* x = n.x + row * n.width;
    const T* residual = n.residual ? n.residual + row * n.width : nullptr;
    const Dropout inner = n.inner;  // a copy: compilers must fear that a store changes what is behind a reference
    const uint32_t key = row_key(inner.seed, uint32_t(row));
    const int width = n.width;
    if (inner.threshold) {
#pragma omp simd
        for (int i = 0; i < width; i++) z[i] = to_f(x[i]) * dropout_factor(key, i, inner);
    } else {
#pragma omp simd
        for (int i = 0; i < width; i++) z[i] = to_f(x[i]);
    }
    float sum = 0.f;
    if (residual) {
        T* kept = n.z + row * width;
        // The sum is rounded before it is normalised, as it would be without fusion; the backward pass sees the same.
#pragma omp simd
        for (int i = 0; i < width; i++) kept[i] = from_f<T>(z[i] + to_f(residual[i]));
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < width; i++) {
            z[i] = to_f(kept[i]);
            sum += z[i];
        }
    } else {
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < width; i++) sum += z[i];
    }
    return sum;
}

template <class T>
void norm_row(const NormRows<T>& n, long long row, float* z) {
    const int width = n.width;
    const float mean = load_sum(n, row, z) / width;
    float squares = 0.f;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < width; i++) squares += (z[i] - mean) * (z[i] - mean);
    const float inv_std = norm_inv_std(squares, width, n.eps);
    n.mean[row] = mean;
    n.inv_std[row] = inv_std;
    const Dropout outer = n.outer;
    const T *weight = n.weight, *bias = n.bias;
    T* out = n.out + row * width;
    const uint32_t key = row_key(outer.seed, uint32_t(row));
    if (outer.threshold) {
#pragma omp simd
        for (int i = 0; i < width; i++) {
            const float y = norm_output(norm_normal(z[i], mean, inv_std), to_f(weight[i]), to_f(bias[i]));
            out[i] = from_f<T>(y * dropout_factor(key, i, outer));
        }
    } else {
#pragma omp simd
        for (int i = 0; i < width; i++)
            out[i] = from_f<T>(norm_output(norm_normal(z[i], mean, inv_std), to_f(weight[i]), to_f(bias[i])));
    }
}

template <class T>
void forward(const NormRows<T>& n, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<float[]> z(new float[n.width]);
#pragma omp for schedule(static)
        for (long long row = 0; row < n.rows; row++) norm_row(n, row, z.get());
    }
}

template <class T>
struct NormGrads {
    const T *grad, *grad_z;  // of `out`, and of z where that was read; grad_z may be missing
    T *grad_x, *grad_sum;    // grad_sum is that of the residual; one buffer where nothing is dropped
};

// The gradient of one row; adds to the sums over rows.
template <class T>
void grad_row(const NormRows<T>& n, const NormGrads<T>& g, long long row, float* dy, float* sums) {
    const int width = n.width;
    const T *z = n.z + row * width, *grad = g.grad + row * width;
    const float mean = n.mean[row], inv_std = n.inv_std[row];
    const Dropout outer = n.outer, inner = n.inner;
    const uint32_t outer_key = row_key(outer.seed, uint32_t(row)), inner_key = row_key(inner.seed, uint32_t(row));
    const T* weight = n.weight;
    float *of_weight = sums, *of_bias = sums + width;
    if (outer.threshold) {
#pragma omp simd
        for (int i = 0; i < width; i++) dy[i] = to_f(grad[i]) * dropout_factor(outer_key, i, outer);
    } else {
#pragma omp simd
        for (int i = 0; i < width; i++) dy[i] = to_f(grad[i]);
    }
    float first = 0.f, second = 0.f;
#pragma omp simd reduction(+ : first, second)
    for (int i = 0; i < width; i++) {
        const float normal = norm_normal(to_f(z[i]), mean, inv_std);
        of_weight[i] += dy[i] * normal;
        of_bias[i] += dy[i];
        const float scaled = dy[i] * to_f(weight[i]);
        first += scaled;
        second += scaled * normal;
    }
    first /= width;
    second /= width;
    T* of_sum = g.grad_sum + row * width;
    if (g.grad_z) {
        const T* of_z = g.grad_z + row * width;
#pragma omp simd
        for (int i = 0; i < width; i++) {
            const float normal = norm_normal(to_f(z[i]), mean, inv_std);
            of_sum[i] = from_f<T>(norm_grad(dy[i] * to_f(weight[i]), normal, first, second, inv_std) + to_f(of_z[i]));
        }
    } else {
#pragma omp simd
        for (int i = 0; i < width; i++) {
            const float normal = norm_normal(to_f(z[i]), mean, inv_std);
            of_sum[i] = from_f<T>(norm_grad(dy[i] * to_f(weight[i]), normal, first, second, inv_std));
        }
    }
    if (!inner.threshold) return;
    T* of_x = g.grad_x + row * width;
#pragma omp simd
    for (int i = 0; i < width; i++) of_x[i] = from_f<T>(to_f(of_sum[i]) * dropout_factor(inner_key, i, inner));
}

template <class T>
void backward(const NormRows<T>& n, const NormGrads<T>& g, float* grad_weight, float* grad_bias, int threads) {
    const size_t width = n.width;
    const std::unique_ptr<float[]> sums(new float[2 * width]);
    sum_rows(n.rows, 2 * width, sums.get(), threads, [&](long long begin, long long end, float* part) {
        const std::unique_ptr<float[]> dy(new float[width]);
        for (long long row = begin; row < end; row++) grad_row(n, g, row, dy.get(), part);
    });
    std::copy_n(sums.get(), width, grad_weight);
    std::copy_n(sums.get() + width, width, grad_bias);
}

}  // namespace

#define LAYER_NORM(NAME, T)                                                                                      \
    extern "C" void layer_norm_##NAME(const NormRows<T>* n, int threads) { forward(*n, threads); }               \
    extern "C" void layer_norm_backward_##NAME(const NormRows<T>* n, const T* grad, const T* grad_z, T* grad_x,  \
                                               T* grad_sum, float* grad_weight, float* grad_bias, int threads) { \
        backward(*n, NormGrads<T>{grad, grad_z, grad_x, grad_sum}, grad_weight, grad_bias, threads);             \
    }
LAYER_NORM(fp32, float)
LAYER_NORM(bf16, bf16)
