// Attention of packed sequences with rotary positions (Su et al. 2021, RoFormer), to all of a sequence or to a window
// around each query, in fp32 arithmetic on any CPU; what lies in memory is fp32 or bf16.
//
// Queries and keys turn while they are copied from the projection's output into a thread's memory, and their gradients
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

namespace {

using Index = long long;

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int kRows = 6, kPanel = 2 * kLanes;
// Queries of a block: few where a window bounds the keys, as a block meets the keys of all its queries.
constexpr int kNarrow = 4 * kRows, kBroad = 8 * kRows;
// Inner indices that a product takes at a time: their panel stays in the first-level cache, and sums of sums round
// less than one long sum.
constexpr int kDepth = 128;

// C [ROWS, COLUMNS vectors] = A B, or C += A B; A's elements are `step` apart along the inner index.
template <int ROWS, int COLUMNS>
inline void tile(const float* a, Index lda, Index step, const float* b, Index ldb, float* c, Index ldc, int depth,
                 bool add) {
    Lanes sum[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; j++) sum[i][j] = Lanes{};
    for (int k = 0; k < depth; k++) {
        Lanes right[COLUMNS];
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; j++) memcpy(&right[j], b + k * ldb + j * kLanes, sizeof(Lanes));
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const float left = a[i * lda + k * step];
#pragma GCC unroll 2
            for (int j = 0; j < COLUMNS; j++) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; j++) {
            float* to = c + i * ldc + j * kLanes;
            Lanes before{};
            if (add) memcpy(&before, to, sizeof(Lanes));
            sum[i][j] += before;
            memcpy(to, &sum[i][j], sizeof(Lanes));
        }
}

template <int COLUMNS>
void panel(int rows, const float* a, Index lda, Index step, const float* b, Index ldb, float* c, Index ldc, int depth,
           bool add) {
    int i = 0;
    for (; i + kRows <= rows; i += kRows)
        tile<kRows, COLUMNS>(a + i * lda, lda, step, b, ldb, c + i * ldc, ldc, depth, add);
    for (; i + 2 <= rows; i += 2) tile<2, COLUMNS>(a + i * lda, lda, step, b, ldb, c + i * ldc, ldc, depth, add);
    if (i < rows) tile<1, COLUMNS>(a + i * lda, lda, step, b, ldb, c + i * ldc, ldc, depth, add);
}

// A matrix whose element (i, k) is at[i * row + k * step].
struct Left {
    const float* at;
    Index row, step;
};

// C [rows, columns] = A B, or C += A B; B is [depth, columns], columns are a multiple of a vector.
void multiply(int rows, int columns, int depth, Left a, const float* b, Index ldb, float* c, Index ldc, bool add) {
    for (int k = 0; k < depth; k += kDepth) {
        const int part = std::min(kDepth, depth - k);
        const float *left = a.at + k * a.step, *right = b + k * ldb;
        int j = 0;
        for (; j + kPanel <= columns; j += kPanel)
            panel<2>(rows, left, a.row, a.step, right + j, ldb, c + j, ldc, part, add || k);
        if (j < columns) panel<1>(rows, left, a.row, a.step, right + j, ldb, c + j, ldc, part, add || k);
    }
}

// C [rows, keys] = A B, B in panels: [keys / kPanel][depth][kPanel].
void multiply_panels(int rows, int keys, int depth, Left a, const float* b, float* c, Index ldc) {
    for (int j = 0; j < keys; j += kPanel)
        panel<2>(rows, a.at, a.row, a.step, b + Index(j) * depth, kPanel, c + j, ldc, depth, false);
}

template <class T>
struct Attention {
    const T* projected;               // [rows, 3, heads, D]: query, key and value of each token
    const float *cos, *sin;           // [tokens, D / 2]
    const long long *start, *length;  // [sequences], of keys and values
    const long long *query_start, *query_length;
    const long long* asking;  // [queries], the token that each query is, ascending; missing where every token asks
    int sequences, heads, width;
    int reach;  // tokens before and behind its own that a query sees; negative for all
    float scale;
    Dropout dropout;
    T* context;      // [queries, heads, D]
    float* log_sum;  // [heads, queries]
    Index queries;   // with rows behind the last one
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
    // Of query (0), key (1) or value (2), in the projection's output or its gradient.
    Index projected(int part) const { return 3 * start * row() + part * row() + head * width; }
    Index context() const { return query_start * row() + head * width; }
    float* log_sum() const { return t.log_sum + head * t.queries + query_start; }
    // The place of a query in its sequence.
    int place(int query) const { return t.asking ? int(t.asking[query_start + query] - start) : query; }
    int padded() const { return (length + kPanel - 1) / kPanel * kPanel; }
    int block() const { return t.reach < 0 ? kBroad : kNarrow; }
    // The keys that a query sees: [first, end).
    int first_key(int query) const { return t.reach < 0 ? 0 : std::max(0, place(query) - t.reach); }
    int end_key(int query) const { return t.reach < 0 ? length : std::min(length, place(query) + t.reach + 1); }
    float kept(uint32_t row_of, int column) const {
        return t.dropout.threshold ? dropout_factor(row_of, uint32_t(column), t.dropout) : 1.f;
    }
};

// [n, D] from memory, `ld` apart.
template <class T>
void copied(const T* x, Index ld, int n, int width, float* to) {
    for (int i = 0; i < n; i++)
#pragma omp simd
        for (int d = 0; d < width; d++) to[Index(i) * width + d] = to_f(x[i * ld + d]);
}

// Query (0) or key (1) of the token at a place of its sequence, turned by its angles, and scaled.
template <class T>
void turned(const Head<T>& h, int part, int place, float scale, float* to) {
    const int half = h.width / 2;
    const T* x = h.t.projected + h.projected(part) + place * 3 * h.row();
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
    for (int i = 0; i < h.length; i++) turned(h, 1, i, 1.f, to + Index(i) * h.width);
}

template <class T>
void turned_queries(const Head<T>& h, int first, int n, float* to) {
    for (int i = 0; i < n; i++) turned(h, 0, h.place(first + i), h.t.scale, to + Index(i) * h.width);
}

// The gradient of what `turned` made turns back into the projection's.
template <class T>
void turned_back(const Head<T>& h, const float* grad, int part, int place, float scale, T* projected) {
    const int half = h.width / 2;
    T* out = projected + h.projected(part) + place * 3 * h.row();
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
void clear_queries(const Head<T>& h, T* projected) {
    for (int i = 0; i < h.length; i++) std::fill_n(projected + h.projected(0) + i * 3 * h.row(), h.width, T{});
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
        for (int j = first; j < end; j++) scores[j] *= h.kept(row, offset + j);
    }
    *factor = 1.f / sum;
    return top + logf(sum);
}

// The keys of queries [first, end): whole panels, W at most.
template <class T>
void keys_of(const Head<T>& h, int first, int end, int* offset, int* wide) {
    *offset = h.first_key(first) / kPanel * kPanel;
    *wide = (h.end_key(end - 1) + kPanel - 1) / kPanel * kPanel - *offset;
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
    copied(h.t.projected + h.projected(2), 3 * h.row(), h.length, width, rows);
    std::fill(rows + Index(h.length) * width, rows + Index(padded) * width, 0.f);
    for (int first = 0; first < h.queries; first += block) {
        const int n = std::min(block, h.queries - first);
        int offset, wide;
        keys_of(h, first, first + n, &offset, &wide);
        const Index ld = wide + kPanel;  // never a power of two, whose rows would share a set of the cache
        turned_queries(h, first, n, query);
        multiply_panels(n, wide, width, {query, width, 1}, keys + Index(offset) * width, scores, ld);
        float factor[kBroad];
        for (int i = 0; i < n; i++) {
            const int from = h.first_key(first + i) - offset, to = h.end_key(first + i) - offset;
            h.log_sum()[first + i] = softmax_row(h, first + i, scores + i * ld, from, to, wide, offset, factor + i);
        }
        multiply(n, width, wide, {scores, ld, 1}, rows + Index(offset) * width, width, out, width, false);
        for (int i = 0; i < n; i++) {
            T* to = h.t.context + h.context() + (first + i) * h.row();
            const float* from = out + Index(i) * width;
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
        for (int j = first; j < end; j++) {
            const float p = fexp(scores[j] - log_sum), factor = h.kept(row, offset + j);
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
void backward(const Head<T>& h, const T* grad, T* grad_projected, Arena& arena) {
    arena.reset();
    const int width = h.width, padded = h.padded(), block = h.block();
    const size_t all = size_t(padded) * width, part = size_t(block) * width;
    auto *rows = arena.take<float>(all), *keys = arena.take<float>(all), *values = arena.take<float>(all);
    auto *of_key = arena.take<float>(all), *of_value = arena.take<float>(all);
    auto *query = arena.take<float>(part), *of_query = arena.take<float>(part), *of_context = arena.take<float>(part);
    auto* scores = arena.take<float>(size_t(block) * (padded + kPanel));
    auto* slopes = arena.take<float>(size_t(block) * (padded + kPanel));
    copied(h.t.projected + h.projected(2), 3 * h.row(), h.length, width, rows);
    in_panels(rows, h.length, padded, width, values);
    turned_keys(h, rows);
    std::fill(rows + Index(h.length) * width, rows + all, 0.f);
    in_panels(rows, h.length, padded, width, keys);
    if (h.queries < h.length) clear_queries(h, grad_projected);
    std::fill(of_key, of_key + all, 0.f);
    std::fill(of_value, of_value + all, 0.f);
    for (int first = 0; first < h.queries; first += block) {
        const int n = std::min(block, h.queries - first);
        int offset, wide;
        keys_of(h, first, first + n, &offset, &wide);
        const Index ld = wide + kPanel, base = Index(offset) * width;
        turned_queries(h, first, n, query);
        copied(grad + h.context() + first * h.row(), h.row(), n, width, of_context);
        multiply_panels(n, wide, width, {query, width, 1}, keys + base, scores, ld);
        multiply_panels(n, wide, width, {of_context, width, 1}, values + base, slopes, ld);
        for (int i = 0; i < n; i++) {
            const T* context = h.t.context + h.context() + (first + i) * h.row();
            const float* g = of_context + Index(i) * width;
            float delta = 0.f;
#pragma omp simd reduction(+ : delta)
            for (int d = 0; d < width; d++) delta += to_f(context[d]) * g[d];
            const int from = h.first_key(first + i) - offset, to = h.end_key(first + i) - offset;
            grad_row(h, first + i, delta, scores + i * ld, slopes + i * ld, from, to, wide, offset);
        }
        multiply(wide, width, n, {scores, 1, ld}, of_context, width, of_value + base, width, true);
        multiply(wide, width, n, {slopes, 1, ld}, query, width, of_key + base, width, true);
        multiply(n, width, wide, {slopes, ld, 1}, rows + base, width, of_query, width, false);
        for (int i = 0; i < n; i++)
            turned_back(h, of_query + Index(i) * width, 0, h.place(first + i), h.t.scale, grad_projected);
    }
    for (int i = 0; i < h.length; i++) {
        turned_back(h, of_key + Index(i) * width, 1, i, 1.f, grad_projected);
        T* to = grad_projected + h.projected(2) + i * 3 * h.row();
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

#define ROTARY_ATTENTION(NAME, T)                                                                                  \
    extern "C" void rotary_attention_##NAME(const Attention<T>* t, int threads) {                                  \
        each_head(*t, threads, [](const Head<T>& h, Arena& arena) { forward(h, arena); });                         \
    }                                                                                                              \
    extern "C" void rotary_attention_backward_##NAME(const Attention<T>* t, const T* grad, T* grad_projected,      \
                                                     int threads) {                                                \
        each_head(*t, threads, [=](const Head<T>& h, Arena& arena) { backward(h, grad, grad_projected, arena); }); \
    }
ROTARY_ATTENTION(fp32, float)
ROTARY_ATTENTION(bf16, bf16)
