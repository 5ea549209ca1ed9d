// Small fp32 products of matrices in a thread's memory, by vectors of any CPU's compiler.
#pragma once

#include <algorithm>
#include <cstring>

namespace {

using Index = long long;

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int kRows = 6, kPanel = 2 * kLanes;
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

}  // namespace
