// Attention of packed sequences, with rotary positions (Su et al. 2021, RoFormer) or without, to all of a sequence or
// to a window around each query, in fp32 arithmetic on any CPU; what lies in memory is fp32 or bf16.
//
// Queries and keys turn while they are copied from the projections' output into a thread's memory, and their gradients
// turn back while they are written, so positions cost no pass of their own. As in FlashAttention (Dao et al. 2022;
// backward: Dao 2023) probabilities are never stored: the forward pass keeps a row's log-sum-exp, the backward pass
// makes them again. A head of a sequence is one thread's work; a block of queries meets only the keys that one of them
// sees. Not every token need be a query. Shapes: S tokens of a sequence, P = S rounded up to a panel, D width of a
// head, W keys of a block.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "../dropout.cuh"
#include "../math.cuh"
#include "arena.h"
#include "products.h"

namespace {

// Queries of a block: few where a window bounds the keys, as a block meets the keys of all its queries.
constexpr int kNarrow = 4 * kRows, kBroad = 8 * kRows;

template <class T>
struct Attention {
    const T *query, *key, *value;     // rows of [heads, D]
    Index stride;                     // from row to row, of all three and of their gradients
    const float *cos, *sin;           // [tokens, D / 2]; missing where nothing turns
    const long long *start, *length;  // [sequences], of keys and values
    const long long *query_start, *query_length;
    const long long* asking;  // [queries], token and row of each query, ascending; missing where a row is a query
    int sequences, heads, width;
    int reach;  // tokens before and behind its own that a query sees; negative for all
    float scale;
    Dropout dropout;
    T* context;      // [queries, heads, D]
    float* log_sum;  // [heads, queries]
    Index queries;   // with rows behind the last one
};

template <class T>
struct Gradients {
    T *query, *key, *value;
};

// One head of one sequence.
template <class T>
struct Head {
    const Attention<T>& t;
    int head, length, queries, width;
    Index start, query_start;
    uint32_t key;

    Head(const Attention<T>& all, int sequence, int which)
        : t(all),
          head(which),
          length(int(all.length[sequence])),
          queries(int(all.query_length[sequence])),
          width(all.width),
          start(all.start[sequence]),
          query_start(all.query_start[sequence]),
          key(hash32(all.dropout.seed + uint32_t(which))) {}
    Index row() const { return Index(t.heads) * width; }
    // Of a query, and of the token at a place of the sequence, in the projections' output or its gradient.
    Index asked(int query) const { return at(t.asking ? t.asking[query_start + query] : query_start + query); }
    Index token(int place) const { return at(start + place); }
    Index at(Index row) const { return row * t.stride + head * width; }
    Index context() const { return query_start * row() + head * width; }
    float* log_sum() const { return t.log_sum + head * t.queries + query_start; }
    // The place of a query in its sequence.
    int place(int query) const { return t.asking ? int(t.asking[query_start + query] - start) : query; }
    int padded() const { return (length + kPanel - 1) / kPanel * kPanel; }
    int block() const { return t.reach < 0 ? kBroad : kNarrow; }
    // The keys that a query sees: [first, end).
    int first_key(int query) const { return t.reach < 0 ? 0 : std::max(0, place(query) - t.reach); }
    int end_key(int query) const { return t.reach < 0 ? length : std::min(length, place(query) + t.reach + 1); }
};

// Asks for the next head's part of a row, which no prefetcher of the processor foresees.
template <class T>
void foresee(const T* x, int width) {
    for (int d = 0; d < width; d += 64 / int(sizeof(T))) __builtin_prefetch(x + width + d);
}

// [n, D] from memory, `ld` apart.
template <class T>
void copied(const T* x, Index ld, int n, int width, float* to) {
    for (int i = 0; i < n; i++) {
        foresee(x + i * ld, width);
#pragma omp simd
        for (int d = 0; d < width; d++) to[Index(i) * width + d] = to_f(x[i * ld + d]);
    }
}

// Query or key of the token at a place of its sequence, turned by its angles, and scaled.
template <class T>
void turned(const Head<T>& h, const T* x, int place, float scale, float* to) {
    foresee(x, h.width);
    if (!h.t.cos) {
#pragma omp simd
        for (int d = 0; d < h.width; d++) to[d] = to_f(x[d]) * scale;
        return;
    }
    const int half = h.width / 2;
    const float *cos = h.t.cos + (h.start + place) * half, *sin = h.t.sin + (h.start + place) * half;
#pragma omp simd
    for (int d = 0; d < half; d++) {
        const float a = to_f(x[d]), b = to_f(x[half + d]);
        to[d] = (a * cos[d] - b * sin[d]) * scale;
        to[half + d] = (b * cos[d] + a * sin[d]) * scale;
    }
}

template <class T>
void turned_keys(const Head<T>& h, float* to) {
    for (int i = 0; i < h.length; i++) turned(h, h.t.key + h.token(i), i, 1.f, to + Index(i) * h.width);
}

template <class T>
void turned_queries(const Head<T>& h, int first, int n, float* to) {
    for (int i = 0; i < n; i++)
        turned(h, h.t.query + h.asked(first + i), h.place(first + i), h.t.scale, to + Index(i) * h.width);
}

// The gradient of what `turned` made turns back into the projection's.
template <class T>
void turned_back(const Head<T>& h, const float* grad, int place, float scale, T* out) {
    foresee(out, h.width);
    if (!h.t.cos) {
#pragma omp simd
        for (int d = 0; d < h.width; d++) out[d] = from_f<T>(grad[d] * scale);
        return;
    }
    const int half = h.width / 2;
    const float *cos = h.t.cos + (h.start + place) * half, *sin = h.t.sin + (h.start + place) * half;
#pragma omp simd
    for (int d = 0; d < half; d++) {
        const float a = grad[d], b = grad[half + d];
        out[d] = from_f<T>((a * cos[d] + b * sin[d]) * scale);
        out[half + d] = from_f<T>((b * cos[d] - a * sin[d]) * scale);
    }
}

// Tokens that ask nothing have no gradient of a query.
template <class T>
void clear_queries(const Head<T>& h, T* grad) {
    for (int i = 0; i < h.length; i++) std::fill_n(grad + h.token(i), h.width, T{});
}

// [S, D] to panels [P / kPanel][D][kPanel], zeros from S to P.
void in_panels(const float* rows, int length, int padded, int width, float* to) {
    for (int j = 0; j < padded; j += kPanel)
        for (int d = 0; d < width; d++) {
            float* line = to + Index(j) * width + d * kPanel;
            const float* from = rows + Index(j) * width + d;
            const int there = std::min(kPanel, length - j);
            for (int l = 0; l < there; l++) line[l] = from[Index(l) * width];
            for (int l = there; l < kPanel; l++) line[l] = 0.f;
        }
}

// Scores of one query become unnormalised, dropped probabilities, zeros outside of [first, end); log-sum-exp, and what
// normalises.
template <class T>
float softmax_row(const Head<T>& h, int query, float* scores, int first, int end, int wide, int offset, float* factor) {
    float top = NEG_INF, sum = 0.f;
#pragma omp simd reduction(max : top)
    for (int j = first; j < end; j++) top = scores[j] > top ? scores[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int j = first; j < end; j++) {
        scores[j] = fexp(scores[j] - top);
        sum += scores[j];
    }
    std::fill(scores, scores + first, 0.f);
    std::fill(scores + end, scores + wide, 0.f);
    if (h.t.dropout.threshold) {
        const uint32_t row = row_key(h.key, uint32_t(h.query_start + query));
        const Dropout dropout = h.t.dropout;
#pragma omp simd
        for (int j = first; j < end; j++) scores[j] *= dropout_factor(row, uint32_t(offset + j), dropout);
    }
    *factor = 1.f / sum;
    return top + logf(sum);
}

// The keys of queries [first, end): W at most, and those of whole panels.
template <class T>
void keys_of(const Head<T>& h, int first, int end, int* offset, int* seen, int* wide) {
    *offset = h.first_key(first) / kPanel * kPanel;
    *seen = h.end_key(end - 1) - *offset;
    *wide = (*seen + kPanel - 1) / kPanel * kPanel;
}

template <class T>
void forward(const Head<T>& h, Arena& arena) {
    arena.reset();
    const int width = h.width, padded = h.padded(), block = h.block();
    auto *rows = arena.take<float>(size_t(padded) * width), *keys = arena.take<float>(size_t(padded) * width);
    auto *query = arena.take<float>(size_t(block) * width), *out = arena.take<float>(size_t(block) * width);
    auto* scores = arena.take<float>(size_t(block) * (padded + kPanel));
    turned_keys(h, rows);
    in_panels(rows, h.length, padded, width, keys);
    copied(h.t.value + h.token(0), h.t.stride, h.length, width, rows);
    std::fill(rows + Index(h.length) * width, rows + Index(padded) * width, 0.f);
    for (int first = 0; first < h.queries; first += block) {
        const int n = std::min(block, h.queries - first);
        int offset, seen, wide;
        keys_of(h, first, first + n, &offset, &seen, &wide);
        const Index ld = wide + kPanel;  // never a power of two, whose rows would share a set of the cache
        turned_queries(h, first, n, query);
        multiply_panels(n, wide, width, {query, width, 1}, keys + Index(offset) * width, scores, ld);
        float factor[kBroad];
        for (int i = 0; i < n; i++) {
            const int from = h.first_key(first + i) - offset, to = h.end_key(first + i) - offset;
            h.log_sum()[first + i] = softmax_row(h, first + i, scores + i * ld, from, to, wide, offset, factor + i);
        }
        multiply(n, width, seen, {scores, ld, 1}, rows + Index(offset) * width, width, out, width, false);
        for (int i = 0; i < n; i++) {
            T* to = h.t.context + h.context() + (first + i) * h.row();
            const float* from = out + Index(i) * width;
            foresee(to, width);
#pragma omp simd
            for (int d = 0; d < width; d++) to[d] = from_f<T>(from[d] * factor[i]);
        }
    }
}

// Scores and the gradients of probabilities of one query become dropped probabilities and gradients of scores, zeros
// outside of [first, end). delta: the sum over the head of the context times its gradient.
template <class T>
void grad_row(const Head<T>& h, int query, float delta, float* scores, float* grads, int first, int end, int wide,
              int offset) {
    const float log_sum = h.log_sum()[query];
    for (float* row : {scores, grads}) {
        std::fill(row, row + first, 0.f);
        std::fill(row + end, row + wide, 0.f);
    }
    if (h.t.dropout.threshold) {
        const uint32_t row = row_key(h.key, uint32_t(h.query_start + query));
        const Dropout dropout = h.t.dropout;
#pragma omp simd
        for (int j = first; j < end; j++) {
            const float p = fexp(scores[j] - log_sum), factor = dropout_factor(row, uint32_t(offset + j), dropout);
            scores[j] = p * factor;
            grads[j] = p * (grads[j] * factor - delta);
        }
        return;
    }
#pragma omp simd
    for (int j = first; j < end; j++) {
        const float p = fexp(scores[j] - log_sum);
        scores[j] = p;
        grads[j] = p * (grads[j] - delta);
    }
}

template <class T>
void backward(const Head<T>& h, const T* grad, const Gradients<T>& found, Arena& arena) {
    arena.reset();
    const int width = h.width, padded = h.padded(), block = h.block();
    const size_t all = size_t(padded) * width, part = size_t(block) * width;
    auto *rows = arena.take<float>(all), *keys = arena.take<float>(all), *values = arena.take<float>(all);
    auto *of_key = arena.take<float>(all), *of_value = arena.take<float>(all);
    auto *query = arena.take<float>(part), *of_query = arena.take<float>(part), *of_context = arena.take<float>(part);
    auto* scores = arena.take<float>(size_t(block) * (padded + kPanel));
    auto* slopes = arena.take<float>(size_t(block) * (padded + kPanel));
    copied(h.t.value + h.token(0), h.t.stride, h.length, width, rows);
    in_panels(rows, h.length, padded, width, values);
    turned_keys(h, rows);
    std::fill(rows + Index(h.length) * width, rows + all, 0.f);
    in_panels(rows, h.length, padded, width, keys);
    if (h.t.asking) clear_queries(h, found.query);
    std::fill(of_key, of_key + all, 0.f);
    std::fill(of_value, of_value + all, 0.f);
    for (int first = 0; first < h.queries; first += block) {
        const int n = std::min(block, h.queries - first);
        int offset, seen, wide;
        keys_of(h, first, first + n, &offset, &seen, &wide);
        const Index ld = wide + kPanel, base = Index(offset) * width;
        turned_queries(h, first, n, query);
        copied(grad + h.context() + first * h.row(), h.row(), n, width, of_context);
        multiply_panels(n, wide, width, {query, width, 1}, keys + base, scores, ld);
        multiply_panels(n, wide, width, {of_context, width, 1}, values + base, slopes, ld);
        for (int i = 0; i < n; i++) {
            const T* context = h.t.context + h.context() + (first + i) * h.row();
            foresee(context, width);
            const float* g = of_context + Index(i) * width;
            float delta = 0.f;
#pragma omp simd reduction(+ : delta)
            for (int d = 0; d < width; d++) delta += to_f(context[d]) * g[d];
            const int from = h.first_key(first + i) - offset, to = h.end_key(first + i) - offset;
            grad_row(h, first + i, delta, scores + i * ld, slopes + i * ld, from, to, wide, offset);
        }
        multiply(seen, width, n, {scores, 1, ld}, of_context, width, of_value + base, width, true);
        multiply(seen, width, n, {slopes, 1, ld}, query, width, of_key + base, width, true);
        multiply(n, width, seen, {slopes, ld, 1}, rows + base, width, of_query, width, false);
        for (int i = 0; i < n; i++)
            turned_back(h, of_query + Index(i) * width, h.place(first + i), h.t.scale,
                        found.query + h.asked(first + i));
    }
    for (int i = 0; i < h.length; i++) {
        turned_back(h, of_key + Index(i) * width, i, 1.f, found.key + h.token(i));
        T* to = found.value + h.token(i);
        foresee(to, width);
        const float* from = of_value + Index(i) * width;
#pragma omp simd
        for (int d = 0; d < width; d++) to[d] = from_f<T>(from[d]);
    }
}

template <class T>
size_t arena_bytes(const Attention<T>& t) {
    Index longest = 0;
    for (int i = 0; i < t.sequences; i++) longest = std::max<Index>(longest, t.length[i]);
    const size_t padded = (longest + kPanel - 1) / kPanel * kPanel, width = t.width;
    return 4 * (5 * padded * width + 3 * kBroad * width + 2 * kBroad * (padded + kPanel)) + 16 * 64;
}

// Calls work(head of a sequence, a thread's memory) for all of them.
template <class T, class Work>
void each_head(const Attention<T>& t, int threads, Work work) {
#pragma omp parallel num_threads(threads)
    {
        Arena arena(arena_bytes(t));
#pragma omp for collapse(2) schedule(dynamic)
        for (int sequence = 0; sequence < t.sequences; sequence++)
            for (int head = 0; head < t.heads; head++) work(Head<T>(t, sequence, head), arena);
    }
}

}  // namespace

#define ATTENTION(NAME, T)                                                                                            \
    extern "C" void packed_attention_##NAME(const Attention<T>* t, int threads) {                                     \
        each_head(*t, threads, [](const Head<T>& h, Arena& arena) { forward(h, arena); });                            \
    }                                                                                                                 \
    extern "C" void packed_attention_backward_##NAME(const Attention<T>* t, const T* grad, const Gradients<T>* found, \
                                                     int threads) {                                                   \
        each_head(*t, threads, [=](const Head<T>& h, Arena& arena) { backward(h, grad, *found, arena); });            \
    }
ATTENTION(fp32, float)
ATTENTION(bf16, bf16)
