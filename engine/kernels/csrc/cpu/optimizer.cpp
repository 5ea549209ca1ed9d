// AdamW and LAMB on CPUs, over a table of segments, in one call whatever the number of tensors.
//
// AdamW is bound by memory: every array is read once and written once. LAMB needs the norms of a whole segment before
// it may move a weight, so it works in waves of segments that fit the last-level cache together: the second pass of
// a wave finds its data there. Sums are made a chunk at a time, in an order that doesn't depend on the threads.
#include <omp.h>

#include <memory>

#include "../math.cuh"

namespace {

// Addresses are one a segment; chunks are numbered from 0 and lie segment after segment.
struct Table {
    const long long *param, *grad, *exp_avg, *exp_avg_sq, *copy;
    const long long *offset, *begin;
    const int *size, *owner, *first;
    const float* weight_decay;
    const bool* trust;
    int segments;
    int chunks;
};

enum Kind { kBf16 = 1, kFp16 = 2 };  // 0: fp32 gradients, no copy

struct Hyper {
    AdamStep adam;
    float lr;
    float trust_clamp;
    bool nvlamb;
};

template <class T>
T* at(const long long* addresses, const Table& t, int chunk) {
    const int segment = t.owner[chunk];
    return reinterpret_cast<T*>(addresses[segment]) + (t.begin[chunk] - t.offset[segment]);
}

struct NoCopy {};
template <class C>
void store_copy(C* copy, int i, float value) {
    copy[i] = from_f<C>(value);
}
inline void store_copy(NoCopy*, int, float) {}

// Elements whose gradients are looked at before they are used: they stay in the first-level cache in between.
constexpr int kBlock = 2048;

template <class G>
bool all_finite(const G* g, int n, float scale) {
    int nonfinite = 0;
#pragma omp simd reduction(+ : nonfinite)
    for (int i = 0; i < n; i++) nonfinite += !is_finite(to_f(g[i]) * scale);
    return nonfinite == 0;
}

// With `check`, elements whose scaled gradient is not finite stay as they are; without, all are known to be finite.
template <bool check, class G, class C>
void adamw_block(float* __restrict p, const G* __restrict g, float* __restrict m, float* __restrict v,
                 C* __restrict copy, int n, float lr, float scale, float decay, const AdamStep adam) {
#pragma omp simd
    for (int i = 0; i < n; i++) {
        const float gradient = to_f(g[i]) * scale;
        const float old_p = p[i], old_m = m[i], old_v = v[i];
        const bool move = !check || is_finite(gradient);
        float moment1 = old_m, moment2 = old_v;
        adam_moments(gradient, moment1, moment2, adam);
        const float direction = adam_direction(old_p, moment1, moment2, decay, adam);
        const float updated = move ? old_p - lr * direction : old_p;
        m[i] = move ? moment1 : old_m;
        v[i] = move ? moment2 : old_v;
        p[i] = updated;
        store_copy(copy, i, updated);
    }
}

// Returns whether a scaled gradient was not finite.
template <class G, class C>
bool adamw_chunk(float* p, const G* g, float* m, float* v, C* copy, int n, float lr, float scale, float decay,
                 const AdamStep& adam) {
    bool nonfinite = false;
    for (int i = 0; i < n; i += kBlock) {
        const int size = n - i < kBlock ? n - i : kBlock;
        const bool finite = all_finite(g + i, size, scale);
        const auto step = finite ? adamw_block<false, G, C> : adamw_block<true, G, C>;
        step(p + i, g + i, m + i, v + i, copy ? copy + i : nullptr, size, lr, scale, decay, adam);
        nonfinite |= !finite;
    }
    return nonfinite;
}

struct Norms {
    double param, update;
    bool nonfinite;
};

// LAMB's first pass: moments, and the squared norms of the weights and of the update.
template <bool check, class G>
Norms lamb_block(const float* __restrict p, const G* __restrict g, float* __restrict m, float* __restrict v, int n,
                 float scale, float decay, const AdamStep adam) {
    float weights = 0.f, updates = 0.f;
#pragma omp simd reduction(+ : weights, updates)
    for (int i = 0; i < n; i++) {
        const float gradient = to_f(g[i]) * scale;
        const float old_p = p[i], old_m = m[i], old_v = v[i];
        const bool move = !check || is_finite(gradient);
        float moment1 = old_m, moment2 = old_v;
        adam_moments(gradient, moment1, moment2, adam);
        const float direction = adam_direction(old_p, moment1, moment2, decay, adam);
        m[i] = move ? moment1 : old_m;
        v[i] = move ? moment2 : old_v;
        weights += old_p * old_p;
        updates += move ? direction * direction : 0.f;
    }
    return {weights, updates, check};
}

template <class G>
Norms lamb_norms(const float* p, const G* g, float* m, float* v, int n, float scale, float decay,
                 const AdamStep& adam) {
    Norms sum{0., 0., false};
    for (int i = 0; i < n; i += kBlock) {
        const int size = n - i < kBlock ? n - i : kBlock;
        const auto block = all_finite(g + i, size, scale) ? lamb_block<false, G> : lamb_block<true, G>;
        const Norms part = block(p + i, g + i, m + i, v + i, size, scale, decay, adam);
        sum = {sum.param + part.param, sum.update + part.update, sum.nonfinite || part.nonfinite};
    }
    return sum;
}

// LAMB's second pass. Gradients are read again only where the first pass met one that is not finite.
template <bool check, class G, class C>
void lamb_apply(float* __restrict p, const G* __restrict g, const float* __restrict m, const float* __restrict v,
                C* __restrict copy, int n, float rate, float scale, float decay, const AdamStep adam) {
#pragma omp simd
    for (int i = 0; i < n; i++) {
        const float moved = p[i] - rate * adam_direction(p[i], m[i], v[i], decay, adam);
        const float updated = check && !is_finite(to_f(g[i]) * scale) ? p[i] : moved;
        p[i] = updated;
        store_copy(copy, i, updated);
    }
}

float segment_ratio(const Table& t, const Norms* norms, int segment, const Hyper& h) {
    if (!t.trust[segment] || !(h.nvlamb || t.weight_decay[segment] != 0.f)) return 1.f;
    double weights = 0., updates = 0.;
    for (int c = t.first[segment]; c < t.first[segment + 1]; c++) {
        weights += norms[c].param;
        updates += norms[c].update;
    }
    return trust_ratio(static_cast<float>(sqrt(weights)), static_cast<float>(sqrt(updates)), h.trust_clamp);
}

// First segment after the wave that starts at `segment`: as many as keep 16 bytes an element within 8 MB.
int wave_end(const Table& t, int segment) {
    constexpr int kChunksOfWave = 16;
    int end = segment + 1;
    while (end < t.segments && t.first[end + 1] - t.first[segment] <= kChunksOfWave) end++;
    return end;
}

template <class G, class C>
int adamw(G*, C*, const Table& t, const Hyper& h, float grad_scale, int threads) {
    int nonfinite = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : nonfinite)
    for (int c = 0; c < t.chunks; c++) {
        const float decay = t.weight_decay[t.owner[c]];
        C* copy = t.copy ? at<C>(t.copy, t, c) : nullptr;
        nonfinite |= adamw_chunk(at<float>(t.param, t, c), at<const G>(t.grad, t, c), at<float>(t.exp_avg, t, c),
                                 at<float>(t.exp_avg_sq, t, c), copy, t.size[c], h.lr, grad_scale, decay, h.adam);
    }
    return nonfinite;
}

template <class G, class C>
int lamb(G*, C*, const Table& t, const Hyper& h, float grad_scale, float* ratio, int threads) {
    const std::unique_ptr<Norms[]> norms(new Norms[t.chunks]);
    int nonfinite = 0;
#pragma omp parallel num_threads(threads) reduction(| : nonfinite)
    for (int segment = 0; segment < t.segments;) {
        const int end = wave_end(t, segment);
#pragma omp for schedule(static)
        for (int c = t.first[segment]; c < t.first[end]; c++) {
            const float decay = t.weight_decay[t.owner[c]];
            norms[c] = lamb_norms(at<const float>(t.param, t, c), at<const G>(t.grad, t, c), at<float>(t.exp_avg, t, c),
                                  at<float>(t.exp_avg_sq, t, c), t.size[c], grad_scale, decay, h.adam);
            nonfinite |= norms[c].nonfinite;
        }
#pragma omp for schedule(static)
        for (int s = segment; s < end; s++) ratio[s] = segment_ratio(t, norms.get(), s, h);
#pragma omp for schedule(static)
        for (int c = t.first[segment]; c < t.first[end]; c++) {
            const float decay = t.weight_decay[t.owner[c]];
            const float rate = h.lr * ratio[t.owner[c]];
            C* copy = t.copy ? at<C>(t.copy, t, c) : nullptr;
            const auto apply = norms[c].nonfinite ? lamb_apply<true, G, C> : lamb_apply<false, G, C>;
            apply(at<float>(t.param, t, c), at<const G>(t.grad, t, c), at<const float>(t.exp_avg, t, c),
                  at<const float>(t.exp_avg_sq, t, c), copy, t.size[c], rate, grad_scale, decay, h.adam);
        }
        segment = end;
    }
    return nonfinite;
}

template <class G>
float norm(G*, const Table& t, int threads) {
    const std::unique_ptr<double[]> squares(new double[t.chunks]);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int c = 0; c < t.chunks; c++) {
        const G* g = at<const G>(t.grad, t, c);
        double sum = 0.;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < t.size[c]; i++) sum += static_cast<double>(to_f(g[i])) * to_f(g[i]);
        squares[c] = sum;
    }
    double sum = 0.;
    for (int c = 0; c < t.chunks; c++) sum += squares[c];
    return static_cast<float>(sqrt(sum));
}

// Calls `run` with a null pointer of the element type that `kind` names.
template <class F>
auto with_gradient(int kind, F run) {
    if (kind == kBf16) return run(static_cast<bf16*>(nullptr));
    if (kind == kFp16) return run(static_cast<fp16*>(nullptr));
    return run(static_cast<float*>(nullptr));
}

template <class F>
auto with_copy(int kind, F run) {
    if (kind == kBf16) return run(static_cast<bf16*>(nullptr));
    if (kind == kFp16) return run(static_cast<fp16*>(nullptr));
    return run(static_cast<NoCopy*>(nullptr));
}

}  // namespace

// One step; LAMB with `ratio` ([segments], written), AdamW without. Returns 1 if a scaled gradient was not finite.
extern "C" int optimizer_step(const Table* table, const Hyper* hyper, const float* grad_scale, int grad_kind,
                              int copy_kind, float* ratio, int threads) {
    return with_gradient(grad_kind, [&](auto* grad) {
        return with_copy(copy_kind, [&](auto* copy) {
            return ratio ? lamb(grad, copy, *table, *hyper, *grad_scale, ratio, threads)
                         : adamw(grad, copy, *table, *hyper, *grad_scale, threads);
        });
    });
}

extern "C" float global_norm(const Table* table, int grad_kind, int threads) {
    return with_gradient(grad_kind, [&](auto* grad) { return norm(grad, *table, threads); });
}
