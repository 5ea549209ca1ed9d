// The formulas of the kernels, written once for the GPU (NVRTC), the emulator and the CPU kernels (g++).
// fp32 throughout; shapes, memory and threads are the callers' business.
#pragma once
#include "types.cuh"

constexpr float LARGEST_FLOAT = 3.402823466e38f;

HD bool is_finite(float x) { return fabsf(x) <= LARGEST_FLOAT; }

// exp(x). On the CPU a branch-free form that compilers vectorise: Cephes' degree-5 polynomial (Moshier) after taking
// out powers of two. Within 2 ulp; 0 below -87.3, 2.4e38 above 88.3, NaN for NaN. Must not be reassociated
// (-ffast-math).
HD float fexp(float x) {
#ifdef __CUDA_ARCH__
    return expf(x);
#else
    const float lowest = -87.33654f, highest = 88.3762626f;
    const float rounder = 12582912.f;  // 1.5 * 2^23: adding it leaves round(y) in the low bits
    float y = x < lowest ? lowest : x;
    y = y > highest ? highest : y;
    const float shifted = y * 1.44269504f + rounder;
    const float n = shifted - rounder;
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const float power = float_of((bits_of(shifted) << 23) + 0x3f800000u);  // 2^n
    return x < lowest ? 0.f : p * power;
#endif
}

// Softmax over part of a row: the maximum, and the sum of exp(x - max) (Milakov & Gimelshein 2018, online softmax).
struct SoftmaxPart {
    float max, sum;
};

// What to subtract before exp: the maximum, or 0 where every logit so far is -inf.
HD float softmax_shift(float max) { return max == NEG_INF ? 0.f : max; }

HD SoftmaxPart merge(SoftmaxPart a, SoftmaxPart b) {
    const float max = a.max > b.max ? a.max : b.max;
    const float shift = softmax_shift(max);
    return {max, a.sum * fexp(a.max - shift) + b.sum * fexp(b.max - shift)};
}

// Whether logit x of class i comes before the target in the ranking (the first maximum wins), or is NaN.
HD bool beats_target(float x, long long i, float target_logit, long long target) {
    return !(x < target_logit) && !(x == target_logit && i >= target);
}

// Constants of a row's gradient; target distribution of label smoothing as in Szegedy et al. 2016, section 7.
struct XentRow {
    float max;         // largest logit of the row
    float inv_sum;     // 1 / sum of exp(x - max)
    float off_target;  // label_smoothing / V
    float on_target;   // 1 - label_smoothing + label_smoothing / V
    float scale;
};

HD XentRow xent_row(SoftmaxPart row, float label_smoothing, long long classes, float scale) {
    const float off_target = label_smoothing / float(classes);
    return {row.max, 1.f / row.sum, off_target, 1.f - label_smoothing + off_target, scale};
}

// d(loss)/d(logit) * scale, from exp(x - max) where it was kept.
HD float xent_grad_of_exp(float e, bool is_target, const XentRow& row) {
    return (e * row.inv_sum - (is_target ? row.on_target : row.off_target)) * row.scale;
}

// d(loss)/d(logit) * scale.
HD float xent_grad(float x, bool is_target, const XentRow& row) {
    return xent_grad_of_exp(fexp(x - row.max), is_target, row);
}

// Loss of a row in nats. rest: sum over the row of (x - target_logit), read only with label smoothing; differences to
// the target keep fp32's precision where the logits themselves are large.
HD float xent_loss(SoftmaxPart row, float target_logit, float rest, float label_smoothing, long long classes) {
    const float nll = logf(row.sum) + (row.max - target_logit);
    return label_smoothing > 0.f ? nll - label_smoothing * (rest / float(classes)) : nll;
}

// Layer normalisation (Ba et al. 2016) of a row z of `width` elements; squares: the sum of (z - mean)^2.
HD float norm_inv_std(float squares, int width, float eps) { return 1.f / sqrtf(squares / width + eps); }

HD float norm_normal(float z, float mean, float inv_std) { return (z - mean) * inv_std; }

HD float norm_output(float normal, float weight, float bias) { return normal * weight + bias; }

// d(loss)/d(z). scaled: the output's gradient times the weight; the means are those of `scaled` and `scaled * normal`
// over the row.
HD float norm_grad(float scaled, float normal, float mean_scaled, float mean_product, float inv_std) {
    return (scaled - mean_scaled - normal * mean_product) * inv_std;
}

// Constants of one step of Adam (Kingma & Ba 2015). The differences are formed in double by the caller: 1 - 0.999 in
// fp32 is off by 5e-5 of its value.
struct AdamStep {
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float eps;
    float inv_correction1;       // 1 / (1 - beta1^step), or 1
    float inv_sqrt_correction2;  // 1 / sqrt(1 - beta2^step), or 1
};

HD void adam_moments(float grad, float& exp_avg, float& exp_avg_sq, const AdamStep& step) {
    exp_avg = step.beta1 * exp_avg + step.one_minus_beta1 * grad;
    exp_avg_sq = step.beta2 * exp_avg_sq + step.one_minus_beta2 * grad * grad;
}

// Direction of the update with decoupled weight decay (Loshchilov & Hutter 2019), before the learning rate.
HD float adam_direction(float param, float exp_avg, float exp_avg_sq, float weight_decay, const AdamStep& step) {
    const float denominator = sqrtf(exp_avg_sq) * step.inv_sqrt_correction2 + step.eps;
    return exp_avg * step.inv_correction1 / denominator + weight_decay * param;
}

// |weights| / |update| (You et al. 2020), at most `clamp`; 1 where either is 0.
template <class R>
HD R trust_ratio(R weight_norm, R update_norm, R clamp) {
    const R ratio = weight_norm > R(0) && update_norm > R(0) ? weight_norm / update_norm : R(1);
    return ratio > clamp ? clamp : ratio;
}
