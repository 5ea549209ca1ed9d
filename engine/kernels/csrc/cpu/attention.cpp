// Attention of packed sequences in bf16 on CPUs with AVX512-BF16: each sequence against itself, head by head, without
// padding, with dropout of the probabilities (Vaswani et al. 2017). As in FlashAttention (Dao et al. 2022; backward:
// Dao 2023) probabilities are never stored: the forward pass keeps a row's log-sum-exp, the backward pass makes them
// again. A head of a sequence is one thread's work, in blocks that stay in the core's second-level cache.
//
// Products take bf16 and add in fp32 (vdpbf16ps), which wants pairs of the inner index side by side: "pairs" below are
// [inner / 2][columns] of 32 bits. Not every token of a sequence need be a query. Shapes: S tokens of a sequence, P = S
// rounded up to a vector, D width of a head, T tokens and Q queries in all.
#include <omp.h>

#include "arena.h"
#include "lanes.h"

#ifdef HAS_LANES
namespace {

constexpr int kRows = 6, kBlock = 64;

// ROWS x (COLUMNS * 16) of C = A B, or C += A B.
template <int ROWS, int COLUMNS>
void tile(const bf16* a, Index lda, const uint32_t* b, Index ldb, float* c, Index ldc, int pairs, bool add) {
    Lanes sum[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++)
            sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * kLanes) : _mm512_setzero_ps();
    for (int k = 0; k < pairs; k++) {
        __m512bh right[COLUMNS];
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            int two;
            memcpy(&two, a + i * lda + 2 * k, sizeof two);
            const __m512bh left = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) _mm512_storeu_ps(c + i * ldc + j * kLanes, sum[i][j]);
}

template <int COLUMNS>
void panel(int rows, const bf16* a, Index lda, const uint32_t* b, Index ldb, float* c, Index ldc, int pairs, bool add) {
    int i = 0;
    for (; i + kRows <= rows; i += kRows) tile<kRows, COLUMNS>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, pairs, add);
    a += i * lda;
    c += i * ldc;
    switch (rows - i) {
        case 1:
            return tile<1, COLUMNS>(a, lda, b, ldb, c, ldc, pairs, add);
        case 2:
            return tile<2, COLUMNS>(a, lda, b, ldb, c, ldc, pairs, add);
        case 3:
            return tile<3, COLUMNS>(a, lda, b, ldb, c, ldc, pairs, add);
        case 4:
            return tile<4, COLUMNS>(a, lda, b, ldb, c, ldc, pairs, add);
        case 5:
            return tile<5, COLUMNS>(a, lda, b, ldb, c, ldc, pairs, add);
    }
}

// C [rows, columns] fp32 = A [rows, 2 pairs] bf16 times B in pairs; columns are a multiple of a vector.
void multiply(int rows, int columns, int pairs, const bf16* a, Index lda, const uint32_t* b, Index ldb, float* c,
              Index ldc, bool add = false) {
    int j = 0;
    for (; j + 64 <= columns; j += 64) panel<4>(rows, a, lda, b + j, ldb, c + j, ldc, pairs, add);
    switch ((columns - j) / kLanes) {
        case 1:
            return panel<1>(rows, a, lda, b + j, ldb, c + j, ldc, pairs, add);
        case 2:
            return panel<2>(rows, a, lda, b + j, ldb, c + j, ldc, pairs, add);
        case 3:
            return panel<3>(rows, a, lda, b + j, ldb, c + j, ldc, pairs, add);
    }
}

// Calls store(pair of columns, first row, that pair of sixteen rows) for all of [S, D], with zeros from S to P.
template <class Store>
void each_pair_of_columns(const bf16* x, Index ld, int rows, int padded, int width, Store store) {
    for (int i = 0; i < padded; i += kLanes)
        for (int k = 0; k < width / 2; k += kLanes) {
            const int pairs = width / 2 - k < kLanes ? width / 2 - k : kLanes;
            __m512i block[kLanes];
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; r++) {
                const __mmask16 there = i + r < rows ? (1 << pairs) - 1 : 0;
                block[r] = _mm512_maskz_loadu_epi32(there, x + (i + r) * ld + 2 * k);
            }
            transpose_lanes(block);
            for (int p = 0; p < pairs; p++) store(k + p, i, block[p]);
        }
}

// Pairs of columns: [S, D] to [D / 2][P], zero beyond S.
void pack_columns(const bf16* x, Index ld, int rows, int padded, int width, uint32_t* to) {
    each_pair_of_columns(x, ld, rows, padded, width, [=](int pair, int row, __m512i lanes) {
        _mm512_storeu_si512(to + Index(pair) * padded + row, lanes);
    });
}

// Sixteen pairs of two rows of sixteen.
__m512i interleaved(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Pairs of rows: [S, D] to [P / 2][D], zero beyond S.
void pack_rows(const bf16* x, Index ld, int rows, int padded, int width, uint32_t* to) {
    for (int i = 0; i < padded; i += 2)
        for (int j = 0; j < width; j += kLanes) {
            const __m256i zero = _mm256_setzero_si256();
            const __m256i even = i < rows ? _mm256_loadu_si256((const __m256i*)(x + i * ld + j)) : zero;
            const __m256i odd = i + 1 < rows ? _mm256_loadu_si256((const __m256i*)(x + (i + 1) * ld + j)) : zero;
            _mm512_storeu_si512(to + i / 2 * width + j, interleaved(even, odd));
        }
}

// [S, D] to [D][P], zero beyond S.
void transpose(const bf16* x, Index ld, int rows, int padded, int width, bf16* to) {
    each_pair_of_columns(x, ld, rows, padded, width, [=](int pair, int row, __m512i lanes) {
        auto* first = (__m256i*)(to + Index(2 * pair) * padded + row);
        auto* second = (__m256i*)(to + Index(2 * pair + 1) * padded + row);
        _mm256_storeu_si256(first, _mm512_cvtepi32_epi16(lanes));
        _mm256_storeu_si256(second, _mm512_cvtepi32_epi16(_mm512_srli_epi32(lanes, 16)));
    });
}

struct Attention {
    const bf16 *query, *key, *value;  // [Q, heads * D], [T, heads * D] twice
    Index stride;                     // elements between two tokens of query, key and value
    const long long *start, *length;  // [sequences], of keys and values
    const long long *query_start, *query_length;
    int sequences, heads, width;
    float scale;
    Dropout dropout;
    bf16* context;   // [Q, heads * D]
    float* log_sum;  // [heads, Q]
    Index queries;
};

int padded(Index length) { return int((length + kLanes - 1) / kLanes * kLanes); }

uint32_t head_key(const Attention& t, int head) { return hash32(t.dropout.seed + uint32_t(head)); }

// Turns a row of products into unnormalised probabilities in bf16 and returns log-sum-exp; `sum` is that of the row.
float softmax_row(const Attention& t, float* scores, int length, int width, uint32_t key, bf16* to, float* sum) {
    const Lanes scale = _mm512_set1_ps(t.scale), low = _mm512_set1_ps(-INFINITY);
    Lanes top = low;
    for (int j = 0; j < width; j += kLanes) {
        const __mmask16 valid = j + kLanes <= length ? 0xffff : (1 << (length - j)) - 1;
        const Lanes x = _mm512_mask_mul_ps(low, valid, _mm512_loadu_ps(scores + j), scale);
        _mm512_storeu_ps(scores + j, x);
        top = _mm512_max_ps(top, x);
    }
    const float max = _mm512_reduce_max_ps(top);
    Lanes total = _mm512_setzero_ps();
    for (int j = 0; j < width; j += kLanes) {
        const __mmask16 valid = j + kLanes <= length ? 0xffff : (1 << (length - j)) - 1;
        const Lanes shifted = _mm512_sub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(max));
        Lanes p = _mm512_maskz_mov_ps(valid, exp_lanes(shifted));
        total = _mm512_add_ps(total, p);
        if (t.dropout.threshold)
            p = _mm512_maskz_mov_ps(kept(_mm512_set1_epi32(int(key)), column_products(j), t.dropout), p);
        store_bf16(to + j, p);
    }
    *sum = _mm512_reduce_add_ps(total);
    return max + logf(*sum);
}

void forward_head(const Attention& t, int sequence, int head, Arena& arena) {
    arena.reset();
    const Index start = t.query_start[sequence], width = t.width, ldc = t.heads * width;
    const int length = int(t.length[sequence]), wide = padded(length), queries = int(t.query_length[sequence]);
    const Index offset = t.start[sequence] * t.stride + head * width;
    const bf16* query = t.query + start * t.stride + head * width;
    auto* keys = arena.take<uint32_t>(size_t(wide) * width / 2);
    auto* values = arena.take<uint32_t>(size_t(wide) * width / 2);
    auto* scores = arena.take<float>(size_t(kBlock) * wide);
    auto* probabilities = arena.take<bf16>(size_t(kBlock) * wide);
    auto* out = arena.take<float>(size_t(kBlock) * width);
    pack_columns(t.key + offset, t.stride, length, wide, int(width), keys);
    pack_rows(t.value + offset, t.stride, length, wide, int(width), values);
    const uint32_t key = head_key(t, head);
    for (int first = 0; first < queries; first += kBlock) {
        const int rows = queries - first < kBlock ? queries - first : kBlock;
        multiply(rows, wide, int(width) / 2, query + first * t.stride, t.stride, keys, wide, scores, wide);
        float sums[kBlock];
        for (int i = 0; i < rows; i++) {
            const uint32_t row = row_key(key, uint32_t(start + first + i));
            t.log_sum[head * t.queries + start + first + i] =
                softmax_row(t, scores + Index(i) * wide, length, wide, row, probabilities + Index(i) * wide, sums + i);
        }
        multiply(rows, int(width), wide / 2, probabilities, wide, values, width, out, width);
        for (int i = 0; i < rows; i++) {
            const Lanes factor = _mm512_set1_ps(t.dropout.scale / sums[i]);
            bf16* to = t.context + (start + first + i) * ldc + head * width;
            for (int j = 0; j < width; j += kLanes)
                store_bf16(to + j, _mm512_mul_ps(_mm512_loadu_ps(out + i * width + j), factor));
        }
    }
}

struct Gradients {
    const bf16* grad;           // of context
    bf16 *query, *key, *value;  // as the tensors
};

// Per query: the sum over the head of gradient times context.
void deltas(const bf16* grad, const bf16* context, Index ld, int length, int wide, int width, float* to) {
    for (int i = 0; i < wide; i++) {
        Lanes sum = _mm512_setzero_ps();
        if (i < length)
            for (int j = 0; j < width; j += kLanes)
                sum = _mm512_fmadd_ps(load_bf16(grad + i * ld + j), load_bf16(context + i * ld + j), sum);
        to[i] = _mm512_reduce_add_ps(sum);
    }
}

// What the backward pass knows of each query of a head, rounded up to vectors.
struct Queries {
    float *log_sum, *delta;
    uint32_t* key;
};

// A row of one key over all queries: products and their gradients turn into dropped probabilities and score gradients.
void grad_row(const Attention& t, const Queries& q, int column, int wide, const float* scores, const float* of_dropped,
              bf16* dropped, bf16* slope) {
    const Lanes scale = _mm512_set1_ps(t.scale), boost = _mm512_set1_ps(t.dropout.scale);
    const __m512i product = _mm512_set1_epi32(int(uint32_t(column) * 0x9e3779b9u));
    for (int j = 0; j < wide; j += kLanes) {
        const Lanes score = _mm512_loadu_ps(scores + j);
        const Lanes p = exp_lanes(_mm512_fmsub_ps(score, scale, _mm512_loadu_ps(q.log_sum + j)));
        const __mmask16 stays =
            t.dropout.threshold ? kept(_mm512_loadu_si512(q.key + j), product, t.dropout) : __mmask16(0xffff);
        store_bf16(dropped + j, _mm512_maskz_mul_ps(stays, p, boost));
        const Lanes inner = _mm512_maskz_mul_ps(stays, _mm512_loadu_ps(of_dropped + j), boost);
        const Lanes difference = _mm512_sub_ps(inner, _mm512_loadu_ps(q.delta + j));
        store_bf16(slope + j, _mm512_mul_ps(_mm512_mul_ps(p, difference), scale));
    }
}

void store_rows(const float* from, int rows, int width, bf16* to, Index ld) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < width; j += kLanes)
            store_bf16(to + i * ld + j, _mm512_loadu_ps(from + Index(i) * width + j));
}

// [D][P] fp32 to [S, D].
void store_transposed(const float* from, int padded, int rows, int width, bf16* to, Index ld) {
    for (int i = 0; i < rows; i += kLanes)
        for (int j = 0; j < width; j += kLanes) {
            __m512i block[kLanes];
#pragma GCC unroll 16
            for (int k = 0; k < kLanes; k++) block[k] = _mm512_loadu_si512(from + Index(j + k) * padded + i);
            transpose_lanes(block);
            for (int k = 0; k < kLanes && i + k < rows; k++)
                store_bf16(to + (i + k) * ld + j, _mm512_castsi512_ps(block[k]));
        }
}

void backward_head(const Attention& t, const Gradients& g, int sequence, int head, Arena& arena) {
    arena.reset();
    const Index start = t.query_start[sequence], ldc = Index(t.heads) * t.width, first_key = t.start[sequence];
    const int length = int(t.length[sequence]), width = t.width, key_wide = padded(length);
    const int asked = int(t.query_length[sequence]), wide = padded(asked);
    const Index offset = first_key * t.stride + head * width, of_keys = first_key * ldc + head * width;
    const Index place = start * ldc + head * width;
    const bf16 *key = t.key + offset, *value = t.value + offset;
    const bf16 *query = t.query + start * t.stride + head * width, *grad = g.grad + place;
    const size_t half = size_t(wide) * width / 2, block = size_t(kBlock) * wide;
    auto *queries = arena.take<uint32_t>(half), *query_rows = arena.take<uint32_t>(half);
    auto *grads = arena.take<uint32_t>(half), *grad_rows = arena.take<uint32_t>(half);
    auto* keys = arena.take<bf16>(size_t(key_wide) * width);
    auto *scores = arena.take<float>(block), *of_dropped = arena.take<float>(block);
    auto *dropped = arena.take<bf16>(block), *slope = arena.take<bf16>(block);
    auto* slope_rows = arena.take<uint32_t>(block / 2);
    auto* of_query = arena.take<float>(2 * half);  // transposed: [D, P]
    auto* out = arena.take<float>(size_t(kBlock) * width);
    const Queries q{arena.take<float>(wide), arena.take<float>(wide), arena.take<uint32_t>(wide)};
    pack_columns(query, t.stride, asked, wide, width, queries);
    pack_rows(query, t.stride, asked, wide, width, query_rows);
    pack_columns(grad, ldc, asked, wide, width, grads);
    pack_rows(grad, ldc, asked, wide, width, grad_rows);
    transpose(key, t.stride, length, key_wide, width, keys);
    deltas(grad, t.context + place, ldc, asked, wide, width, q.delta);
    const uint32_t head_seed = head_key(t, head);
    for (int i = 0; i < wide; i++) {
        q.log_sum[i] = i < asked ? t.log_sum[head * t.queries + start + i] : INFINITY;
        q.key[i] = row_key(head_seed, uint32_t(start + i));
    }
    for (int first = 0; first < length; first += kBlock) {
        const int rows = length - first < kBlock ? length - first : kBlock, even = rows + rows % 2;
        multiply(rows, wide, width / 2, key + first * t.stride, t.stride, queries, wide, scores, wide);
        multiply(rows, wide, width / 2, value + first * t.stride, t.stride, grads, wide, of_dropped, wide);
        for (int i = 0; i < rows; i++) {
            const Index row = Index(i) * wide;
            grad_row(t, q, first + i, wide, scores + row, of_dropped + row, dropped + row, slope + row);
        }
        if (even > rows) memset(slope + Index(rows) * wide, 0, sizeof(bf16) * wide);
        pack_rows(slope, wide, even, even, wide, slope_rows);
        multiply(rows, width, wide / 2, dropped, wide, grad_rows, width, out, width);
        store_rows(out, rows, width, g.value + of_keys + first * ldc, ldc);
        multiply(rows, width, wide / 2, slope, wide, query_rows, width, out, width);
        store_rows(out, rows, width, g.key + of_keys + first * ldc, ldc);
        multiply(width, wide, even / 2, keys + first, key_wide, slope_rows, wide, of_query, wide, first > 0);
    }
    store_transposed(of_query, wide, asked, width, g.query + place, ldc);
}

size_t arena_bytes(const Attention& t) {
    Index longest = 0;
    for (int i = 0; i < t.sequences; i++) longest = t.length[i] > longest ? t.length[i] : longest;
    const size_t wide = padded(longest), width = t.width;
    return wide * width * 14 + kBlock * wide * 14 + kBlock * width * 4 + wide * 12 + 64 * 16;
}

}  // namespace

extern "C" bool attention_usable() { return lanes_usable(); }

extern "C" void attention_forward(const Attention* t, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Arena arena(arena_bytes(*t));
#pragma omp for collapse(2) schedule(dynamic)
        for (int sequence = 0; sequence < t->sequences; sequence++)
            for (int head = 0; head < t->heads; head++) forward_head(*t, sequence, head, arena);
    }
}

extern "C" void attention_backward(const Attention* t, const Gradients* g, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Arena arena(arena_bytes(*t));
#pragma omp for collapse(2) schedule(dynamic)
        for (int sequence = 0; sequence < t->sequences; sequence++)
            for (int head = 0; head < t->heads; head++) backward_head(*t, *g, sequence, head, arena);
    }
}

#else
extern "C" bool attention_usable() { return false; }
#endif
