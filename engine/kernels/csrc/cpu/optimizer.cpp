// AdamW and LAMB on CPUs, over a table of segments, in one call whatever the number of tensors.
//
// AdamW is bound by memory: every array is read once and written once. LAMB needs the norms of a whole segment before
// it may move a weight, so it works in waves of segments that fit the last-level cache together: the second pass of
// a wave finds its data there. Where segments are parts of split parameters, the two passes are calls of their own.
// Sums are made a block at a time, in an order that doesn't depend on the threads, and no multiplication is fused with
// an addition: every build, whatever its instruction set, gives the same bits, and so do LAMB in one call and in two.
#pragma GCC optimize("fp-contract=off")
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
    float grad_scale;
    float trust_clamp;
    bool nvlamb;
};

struct NoCopy {};

// The arrays of one chunk, or of a part of it.
template <class G, class C>
struct Arrays {
    float* param;
    const G* grad;
    float* exp_avg;
    float* exp_avg_sq;
    C* copy;
    float decay;
};

template <class T>
T* at(const long long* addresses, const Table& t, int chunk) {
    const int segment = t.owner[chunk];
    return reinterpret_cast<T*>(addresses[segment]) + (t.begin[chunk] - t.offset[segment]);
}

template <class G, class C>
Arrays<G, C> arrays_of(const Table& t, int c) {
    C* copy = t.copy ? at<C>(t.copy, t, c) : nullptr;
    return {at<float>(t.param, t, c),
            at<const G>(t.grad, t, c),
            at<float>(t.exp_avg, t, c),
            at<float>(t.exp_avg_sq, t, c),
            copy,
            t.weight_decay[t.owner[c]]};
}

template <class C>
HD C* advance(C* copy, int i) {
    return copy + i;
}
HD NoCopy* advance(NoCopy* copy, int) { return copy; }

template <class G, class C>
HD Arrays<G, C> advance(const Arrays<G, C>& a, int i) {
    return {a.param + i, a.grad + i, a.exp_avg + i, a.exp_avg_sq + i, advance(a.copy, i), a.decay};
}

template <class C>
HD void store_copy(C* copy, int i, float value) {
    copy[i] = from_f<C>(value);
}
HD void store_copy(NoCopy*, int, float) {}

// Elements of one step of the loops below: a vector register of AVX-512, a cache line of fp32. The functions named
// ..._lanes work on at most so many; their loops vectorise only over restrict pointers of their own.
constexpr int kLanes = 16;
// How far ahead cache lines are asked for, in elements: the hardware's prefetchers alone leave a tenth of the memory's
// bandwidth unused over seven streams.
constexpr int kAhead = 512;
// Elements whose squares are summed in fp32 before the sum goes on in fp64.
constexpr int kBlock = 2048;

template <class G, class C>
HD void prefetch(const Arrays<G, C>& a) {
    __builtin_prefetch(a.param + kAhead, 1);
    __builtin_prefetch(a.grad + kAhead, 0);
    __builtin_prefetch(a.exp_avg + kAhead, 1);
    __builtin_prefetch(a.exp_avg_sq + kAhead, 1);
}

// Returns whether a scaled gradient was not finite: such an element stays as it is.
template <class G, class C>
HD int adamw_lanes(const Arrays<G, C>& a, int count, const Hyper& h) {
    float* __restrict p = a.param, * __restrict m = a.exp_avg, * __restrict v = a.exp_avg_sq;
    const G* __restrict g = a.grad;
    C* __restrict copy = a.copy;
    int nonfinite = 0;
#pragma omp simd reduction(| : nonfinite)
    for (int i = 0; i < count; i++) {
        const float gradient = to_f(g[i]) * h.grad_scale;
        const float old_p = p[i], old_m = m[i], old_v = v[i];
        const bool move = is_finite(gradient);
        float moment1 = old_m, moment2 = old_v;
        adam_moments(gradient, moment1, moment2, h.adam);
        const float direction = adam_direction(old_p, moment1, moment2, a.decay, h.adam);
        const float updated = move ? old_p - h.lr * direction : old_p;
        m[i] = move ? moment1 : old_m;
        v[i] = move ? moment2 : old_v;
        p[i] = updated;
        store_copy(copy, i, updated);
        nonfinite |= !move;
    }
    return nonfinite;
}

template <class G, class C>
int adamw_chunk(const Arrays<G, C> a, int size, const Hyper h) {
    int nonfinite = 0, i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const Arrays<G, C> here = advance(a, i);
        prefetch(here);
        nonfinite |= adamw_lanes(here, kLanes, h);
    }
    return nonfinite | adamw_lanes(advance(a, i), size - i, h);
}

// Squared norms of the weights and of the update.
struct Norms {
    double param, update;
    bool nonfinite;
};

// LAMB's first pass over a few elements; adds squares to those of each lane.
template <class G>
HD int moments_lanes(const Arrays<G, NoCopy>& a, int count, const Hyper& h, float* __restrict weights,
                     float* __restrict updates) {
    const float* __restrict p = a.param;
    float* __restrict m = a.exp_avg, * __restrict v = a.exp_avg_sq;
    const G* __restrict g = a.grad;
    int nonfinite = 0;
#pragma omp simd reduction(| : nonfinite)
    for (int i = 0; i < count; i++) {
        const float gradient = to_f(g[i]) * h.grad_scale;
        const float old_p = p[i], old_m = m[i], old_v = v[i];
        const bool move = is_finite(gradient);
        float moment1 = old_m, moment2 = old_v;
        adam_moments(gradient, moment1, moment2, h.adam);
        const float direction = adam_direction(old_p, moment1, moment2, a.decay, h.adam);
        m[i] = move ? moment1 : old_m;
        v[i] = move ? moment2 : old_v;
        weights[i] += old_p * old_p;
        updates[i] += move ? direction * direction : 0.f;
        nonfinite |= !move;
    }
    return nonfinite;
}

template <class G>
Norms moments_block(const Arrays<G, NoCopy> a, int size, const Hyper h) {
    float weights[kLanes] = {}, updates[kLanes] = {};
    int nonfinite = 0, i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const Arrays<G, NoCopy> here = advance(a, i);
        prefetch(here);
        nonfinite |= moments_lanes(here, kLanes, h, weights, updates);
    }
    nonfinite |= moments_lanes(advance(a, i), size - i, h, weights, updates);
    Norms total{0., 0., nonfinite != 0};
    for (int k = 0; k < kLanes; k++) {
        total.param += weights[k];
        total.update += updates[k];
    }
    return total;
}

template <class G>
Norms moments_of_chunk(const Arrays<G, NoCopy>& a, int size, const Hyper& h) {
    Norms total{0., 0., false};
    for (int i = 0; i < size; i += kBlock) {
        const Norms part = moments_block(advance(a, i), size - i < kBlock ? size - i : kBlock, h);
        total = {total.param + part.param, total.update + part.update, total.nonfinite || part.nonfinite};
    }
    return total;
}

// LAMB's second pass. Gradients are read again only with `check`, where the first pass met one that is not finite.
template <bool check, class G, class C>
HD void apply_lanes(const Arrays<G, C>& a, int count, const Hyper& h, float rate) {
    float* __restrict p = a.param;
    const float* __restrict m = a.exp_avg, * __restrict v = a.exp_avg_sq;
    const G* __restrict g = a.grad;
    C* __restrict copy = a.copy;
#pragma omp simd
    for (int i = 0; i < count; i++) {
        const float moved = p[i] - rate * adam_direction(p[i], m[i], v[i], a.decay, h.adam);
        const float updated = check && !is_finite(to_f(g[i]) * h.grad_scale) ? p[i] : moved;
        p[i] = updated;
        store_copy(copy, i, updated);
    }
}

template <bool check, class G, class C>
void apply_to_chunk(const Arrays<G, C> a, int size, const Hyper h, float rate) {
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const Arrays<G, C> here = advance(a, i);
        __builtin_prefetch(here.param + kAhead, 1);
        __builtin_prefetch(here.exp_avg + kAhead, 0);
        __builtin_prefetch(here.exp_avg_sq + kAhead, 0);
        apply_lanes<check>(here, kLanes, h, rate);
    }
    apply_lanes<check>(advance(a, i), size - i, h, rate);
}

Norms sum_of_segment(const Table& t, const Norms* norms, int segment) {
    Norms sum{0., 0., false};
    for (int c = t.first[segment]; c < t.first[segment + 1]; c++) {
        sum.param += norms[c].param;
        sum.update += norms[c].update;
    }
    return sum;
}

float segment_ratio(const Table& t, const Norms* norms, int segment, const Hyper& h) {
    if (!t.trust[segment] || !(h.nvlamb || t.weight_decay[segment] != 0.f)) return 1.f;
    const Norms sum = sum_of_segment(t, norms, segment);
    return static_cast<float>(trust_ratio(sqrt(sum.param), sqrt(sum.update), static_cast<double>(h.trust_clamp)));
}

// First segment after the wave that starts at `segment`: as many as keep 16 bytes an element within 8 MB.
int wave_end(const Table& t, int segment) {
    constexpr int kChunksOfWave = 16;
    int end = segment + 1;
    while (end < t.segments && t.first[end + 1] - t.first[segment] <= kChunksOfWave) end++;
    return end;
}

// The loops over chunks and segments below are shared out among the threads of the parallel region that calls them.
template <class G>
int moments_of_chunks(const Table& t, const Hyper& h, int begin, int end, Norms* norms) {
    int nonfinite = 0;
#pragma omp for schedule(static)
    for (int c = begin; c < end; c++) {
        norms[c] = moments_of_chunk(arrays_of<G, NoCopy>(t, c), t.size[c], h);
        nonfinite |= norms[c].nonfinite;
    }
    return nonfinite;
}

template <class G, class C, class Check>
void apply_to_chunks(const Table& t, const Hyper& h, int begin, int end, const float* ratio, Check check) {
#pragma omp for schedule(static)
    for (int c = begin; c < end; c++) {
        const auto apply = check(c) ? apply_to_chunk<true, G, C> : apply_to_chunk<false, G, C>;
        apply(arrays_of<G, C>(t, c), t.size[c], h, h.lr * ratio[t.owner[c]]);
    }
}

template <class G, class C>
int adamw(const Table& t, const Hyper& h, int threads) {
    int nonfinite = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : nonfinite)
    for (int c = 0; c < t.chunks; c++) nonfinite |= adamw_chunk(arrays_of<G, C>(t, c), t.size[c], h);
    return nonfinite;
}

template <class G, class C>
int lamb(const Table& t, const Hyper& h, float* ratio, int threads) {
    const std::unique_ptr<Norms[]> norms(new Norms[t.chunks]);
    int nonfinite = 0;
#pragma omp parallel num_threads(threads) reduction(| : nonfinite)
    for (int segment = 0; segment < t.segments;) {
        const int end = wave_end(t, segment);
        nonfinite |= moments_of_chunks<G>(t, h, t.first[segment], t.first[end], norms.get());
#pragma omp for schedule(static)
        for (int s = segment; s < end; s++) ratio[s] = segment_ratio(t, norms.get(), s, h);
        apply_to_chunks<G, C>(t, h, t.first[segment], t.first[end], ratio, [&](int c) { return norms[c].nonfinite; });
        segment = end;
    }
    return nonfinite;
}

template <class G>
int moments(const Table& t, const Hyper& h, double* squares, int threads) {
    const std::unique_ptr<Norms[]> norms(new Norms[t.chunks]);
    int nonfinite = 0;
#pragma omp parallel num_threads(threads) reduction(| : nonfinite)
    {
        nonfinite |= moments_of_chunks<G>(t, h, 0, t.chunks, norms.get());
#pragma omp for schedule(static)
        for (int s = 0; s < t.segments; s++) {
            const Norms sum = sum_of_segment(t, norms.get(), s);
            squares[2 * s] = sum.param;
            squares[2 * s + 1] = sum.update;
        }
    }
    return nonfinite;
}

template <class G>
float norm(const Table& t, int threads) {
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

template <class T>
struct Type {
    using type = T;
};

// Calls `run` with the type that `kind` names.
template <class F>
auto with_gradient(int kind, F run) {
    if (kind == kBf16) return run(Type<bf16>());
    if (kind == kFp16) return run(Type<fp16>());
    return run(Type<float>());
}

template <class F>
auto with_types(int grad_kind, int copy_kind, F run) {
    return with_gradient(grad_kind, [&](auto grad) {
        if (copy_kind == kBf16) return run(grad, Type<bf16>());
        if (copy_kind == kFp16) return run(grad, Type<fp16>());
        return run(grad, Type<NoCopy>());
    });
}

}  // namespace

// The steps return 1 if a scaled gradient was not finite.
extern "C" int adamw_step(const Table* table, const Hyper* hyper, int grad_kind, int copy_kind, int threads) {
    return with_types(grad_kind, copy_kind, [&](auto grad, auto copy) {
        return adamw<typename decltype(grad)::type, typename decltype(copy)::type>(*table, *hyper, threads);
    });
}

// ratio: [segments], written.
extern "C" int lamb_step(const Table* table, const Hyper* hyper, int grad_kind, int copy_kind, float* ratio,
                         int threads) {
    return with_types(grad_kind, copy_kind, [&](auto grad, auto copy) {
        return lamb<typename decltype(grad)::type, typename decltype(copy)::type>(*table, *hyper, ratio, threads);
    });
}

// squares: [segments, 2], written: squared norms of weights and update.
extern "C" int lamb_moments(const Table* table, const Hyper* hyper, int grad_kind, double* squares, int threads) {
    return with_gradient(
        grad_kind, [&](auto grad) { return moments<typename decltype(grad)::type>(*table, *hyper, squares, threads); });
}

// nonfinite: what lamb_moments returned.
extern "C" void lamb_apply(const Table* table, const Hyper* hyper, int grad_kind, int copy_kind, const float* ratio,
                           int nonfinite, int threads) {
    with_types(grad_kind, copy_kind, [&](auto grad, auto copy) {
#pragma omp parallel num_threads(threads)
        apply_to_chunks<typename decltype(grad)::type, typename decltype(copy)::type>(
            *table, *hyper, 0, table->chunks, ratio, [&](int) { return nonfinite != 0; });
    });
}

extern "C" float global_norm(const Table* table, int grad_kind, int threads) {
    return with_gradient(grad_kind, [&](auto grad) { return norm<typename decltype(grad)::type>(*table, threads); });
}
