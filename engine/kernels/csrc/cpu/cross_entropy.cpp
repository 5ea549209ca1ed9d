// Softmax cross-entropy on CPUs: loss, hit and, in place of the logits, the gradient. One thread a row.
//
// A row is read from memory once and written once: its passes run in the core's second-level cache (30522 classes are
// 122 KB in fp32). Exponentials are computed once: for the gradient they are kept in fp32, in place of an fp32 row or
// else in a scratch row.
#include <omp.h>

#include <memory>

#include "../math.cuh"

namespace {

struct Options {
    long long ignore_index;
    float smoothing;
    float scale;
    bool gradient;
};

template <class T>
float row_max(const T* x, int classes) {
    float top = NEG_INF;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < classes; i++) {
        const float value = to_f(x[i]);
        top = value > top ? value : top;
    }
    return top;
}

// Sum of exp(x - shift); with `keep`, the exponentials go to `e`, which may be `x` itself.
template <bool keep, class T>
float exp_sum(const T* x, float* e, int classes, float shift) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < classes; i++) {
        const float value = fexp(to_f(x[i]) - shift);
        if (keep) e[i] = value;
        sum += value;
    }
    return sum;
}

template <class T>
float sum_of_differences(const T* x, int classes, float target_logit) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < classes; i++) sum += to_f(x[i]) - target_logit;
    return sum;
}

template <class T>
bool is_prediction(const T* x, int classes, long long target, float target_logit, float max) {
    if (target_logit != max) return false;
    int ahead = 0;
#pragma omp simd reduction(+ : ahead)
    for (int i = 0; i < classes; i++) ahead += i != target && beats_target(to_f(x[i]), i, target_logit, target);
    return ahead == 0;
}

template <class T>
void write_gradient(T* x, const float* e, int classes, long long target, const XentRow& row) {
    const float at_target = xent_grad_of_exp(e[target], true, row);
#pragma omp simd
    for (int i = 0; i < classes; i++) x[i] = from_f<T>(xent_grad_of_exp(e[i], false, row));
    x[target] = from_f<T>(at_target);
}

float* room_for_exp(float* row, float*) { return row; }
template <class T>
float* room_for_exp(T*, float* scratch) {
    return scratch;
}

template <class T>
void row_loss(T* x, int classes, long long target, const Options& o, float* scratch, float* loss, bool* hit) {
    const float max = row_max(x, classes), target_logit = to_f(x[target]), shift = softmax_shift(max);
    const float rest = o.smoothing > 0.f ? sum_of_differences(x, classes, target_logit) : 0.f;
    *hit = is_prediction(x, classes, target, target_logit, max);
    float* e = room_for_exp(x, scratch);
    const float sum = o.gradient ? exp_sum<true>(x, e, classes, shift) : exp_sum<false>(x, e, classes, shift);
    const SoftmaxPart part{max, sum};
    *loss = xent_loss(part, target_logit, rest, o.smoothing, classes);
    if (o.gradient) write_gradient(x, e, classes, target, xent_row(part, o.smoothing, classes, o.scale));
}

template <class T>
void ignored_row(T* x, int classes, const Options& o, float* loss, bool* hit) {
    *loss = 0.f;
    *hit = false;
    if (o.gradient) std::memset(x, 0, sizeof(T) * classes);
}

template <class T>
void cross_entropy(T* logits, long long stride, const long long* target, long long rows, int classes, const Options& o,
                   float* loss, bool* hit, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<float[]> scratch(new float[sizeof(T) < sizeof(float) ? classes : 1]);
#pragma omp for schedule(static)
        for (long long r = 0; r < rows; r++) {
            T* x = logits + r * stride;
            if (target[r] == o.ignore_index)
                ignored_row(x, classes, o, loss + r, hit + r);
            else
                row_loss(x, classes, target[r], o, scratch.get(), loss + r, hit + r);
        }
    }
}

}  // namespace

#define SOFTMAX_CROSS_ENTROPY(NAME, T)                                                                                \
    extern "C" void NAME(T* logits, long long stride, const long long* target, const float* scale, long long rows,    \
                         int classes, long long ignore_index, float smoothing, bool gradient, float* loss, bool* hit, \
                         int threads) {                                                                               \
        const Options options{ignore_index, smoothing, *scale, gradient};                                             \
        cross_entropy(logits, stride, target, rows, classes, options, loss, hit, threads);                            \
    }
SOFTMAX_CROSS_ENTROPY(softmax_cross_entropy_fp32, float)
SOFTMAX_CROSS_ENTROPY(softmax_cross_entropy_bf16, bf16)
SOFTMAX_CROSS_ENTROPY(softmax_cross_entropy_fp16, fp16)
