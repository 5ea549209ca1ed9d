// Sums over rows that have the same bits for any number of threads.
#pragma once
#include <omp.h>

#include <memory>

// Rows are cut into so many groups whatever the number of threads.
constexpr int kGroups = 16;

// Calls work(begin, end, sum) for each group of rows, where `sum` [columns] starts as zeros, and writes their total.
template <class Work>
void sum_rows(long long rows, size_t columns, float* total, int threads, Work work) {
    const std::unique_ptr<float[]> sums(new float[kGroups * columns]());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int group = 0; group < kGroups; group++)
        work(rows * group / kGroups, rows * (group + 1) / kGroups, sums.get() + group * columns);
    for (int group = 0; group < kGroups; group++) {
        const float* part = sums.get() + group * columns;
        for (size_t i = 0; i < columns; i++) total[i] = (group ? total[i] : 0.f) + part[i];
    }
}
