// Softmax cross-entropy on CPUs: loss, hit and, in place of the logits, the gradient. One thread a row.
//
// A row is read from memory once and written once: its passes run in the core's second-level cache (30522 classes are
// 122 KB in fp32) over a copy in fp32, which for fp32 rows is the row itself. The bias is added and its gradient summed
// on the way, so neither costs a pass over the logits.
#include "../math.cuh"
#include "row_sums.h"

namespace {

struct Options {
    long long ignore_index;
    float smoothing;
    float scale;
    bool gradient;
};

// Copies x + bias to `e`, which may be `x` itself, and returns the maximum. Without a bias its pointer is null.
template <bool biased, class T>
float load_row(const T* x, const T* bias, float* e, int classes) {
    float top = NEG_INF;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < classes; i++) {
        const float value = biased ? to_f(x[i]) + to_f(bias[i]) : to_f(x[i]);
        e[i] = value;
        top = value > top ? value : top;
    }
    return top;
}

float sum_of_differences(const float* e, int classes, float target_logit) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < classes; i++) sum += e[i] - target_logit;
    return sum;
}

bool is_prediction(const float* e, int classes, long long target, float target_logit, float max) {
    if (target_logit != max) return false;
    int ahead = 0;
#pragma omp simd reduction(+ : ahead)
    for (int i = 0; i < classes; i++) ahead += i != target && beats_target(e[i], i, target_logit, target);
    return ahead == 0;
}

// Replaces e by exp(e - shift) and returns the sum.
float exp_in_place(float* e, int classes, float shift) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < classes; i++) {
        const float value = fexp(e[i] - shift);
        e[i] = value;
        sum += value;
    }
    return sum;
}

template <bool biased, class T>
void write_gradient(T* x, const float* e, float* grad_bias, int classes, long long target, const XentRow& row) {
    const float at_target = xent_grad_of_exp(e[target], true, row), elsewhere = xent_grad_of_exp(e[target], false, row);
#pragma omp simd
    for (int i = 0; i < classes; i++) {
        const float slope = xent_grad_of_exp(e[i], false, row);
        x[i] = from_f<T>(slope);
        if (biased) grad_bias[i] += slope;
    }
    x[target] = from_f<T>(at_target);
    if (biased) grad_bias[target] += at_target - elsewhere;
}

template <class T>
struct Rows {
    T* logits;
    long long stride;
    const T* bias;
    const long long* target;
    long long count;
    int classes;
    float* loss;
    bool* hit;
};

template <bool biased, class T>
void row_loss(const Rows<T>& rows, long long r, const Options& o, float* e, float* grad_bias) {
    T* x = rows.logits + r * rows.stride;
    const int classes = rows.classes;
    const long long target = rows.target[r];
    const float max = load_row<biased>(x, rows.bias, e, classes);
    const float target_logit = e[target];
    const float rest = o.smoothing > 0.f ? sum_of_differences(e, classes, target_logit) : 0.f;
    rows.hit[r] = is_prediction(e, classes, target, target_logit, max);
    const SoftmaxPart part{max, exp_in_place(e, classes, softmax_shift(max))};
    rows.loss[r] = xent_loss(part, target_logit, rest, o.smoothing, classes);
    if (o.gradient)
        write_gradient<biased>(x, e, grad_bias, classes, target, xent_row(part, o.smoothing, classes, o.scale));
}

template <class T>
void ignored_row(const Rows<T>& rows, long long r, const Options& o) {
    rows.loss[r] = 0.f;
    rows.hit[r] = false;
    if (o.gradient) std::memset(rows.logits + r * rows.stride, 0, sizeof(T) * rows.classes);
}

// An fp32 row that turns into its gradient anyway needs no copy.
float* room_for_row(float* row, float* scratch, bool gradient) { return gradient ? row : scratch; }
template <class T>
float* room_for_row(T*, float* scratch, bool) {
    return scratch;
}

template <bool biased, class T>
void group_loss(const Rows<T>& rows, int group, const Options& o, float* scratch, float* grad_bias) {
    const long long begin = rows.count * group / kGroups, end = rows.count * (group + 1) / kGroups;
    for (long long r = begin; r < end; r++) {
        float* e = room_for_row(rows.logits + r * rows.stride, scratch, o.gradient);
        if (rows.target[r] == o.ignore_index)
            ignored_row(rows, r, o);
        else
            row_loss<biased>(rows, r, o, e, grad_bias);
    }
}

template <bool biased, class T>
void cross_entropy(const Rows<T>& rows, const Options& o, float* grad_bias, int threads) {
    const size_t classes = rows.classes;
    const bool sum_bias = biased && o.gradient;
    const std::unique_ptr<float[]> sums(sum_bias ? new float[kGroups * classes]() : nullptr);
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<float[]> scratch(sizeof(T) == sizeof(float) && o.gradient ? nullptr : new float[classes]);
#pragma omp for schedule(static)
        for (int group = 0; group < kGroups; group++)
            group_loss<biased>(rows, group, o, scratch.get(), sums.get() + (sum_bias ? group * classes : 0));
        if (sum_bias) {
#pragma omp for simd schedule(static)
            for (size_t i = 0; i < classes; i++) {
                float sum = 0.f;
                for (int group = 0; group < kGroups; group++) sum += sums[group * classes + i];
                grad_bias[i] = sum;
            }
        }
    }
}

}  // namespace

// bias: [classes] or null; grad_bias: [classes] fp32, written if there are a bias and a gradient.
#define SOFTMAX_CROSS_ENTROPY(NAME, T)                                                                            \
    extern "C" void NAME(T* logits, long long stride, const T* bias, const long long* target, const float* scale, \
                         long long count, int classes, long long ignore_index, float smoothing, bool gradient,    \
                         float* loss, bool* hit, float* grad_bias, int threads) {                                 \
        const Options options{ignore_index, smoothing, *scale, gradient};                                         \
        const Rows<T> rows{logits, stride, bias, target, count, classes, loss, hit};                              \
        bias ? cross_entropy<true>(rows, options, grad_bias, threads)                                             \
             : cross_entropy<false>(rows, options, grad_bias, threads);                                           \
    }
SOFTMAX_CROSS_ENTROPY(softmax_cross_entropy_fp32, float)
SOFTMAX_CROSS_ENTROPY(softmax_cross_entropy_bf16, bf16)
SOFTMAX_CROSS_ENTROPY(softmax_cross_entropy_fp16, fp16)
