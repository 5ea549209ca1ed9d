// Adds rows to the rows of a table, in bf16: the gradient of an embedding. Rows for one place are summed in fp32 first.
#include <omp.h>

#include <memory>

#include "../math.cuh"

namespace {

struct Rows {
    const bf16* values;
    const long long *place, *order;  // places in ascending order, and where their rows lie
    long long count;
    int width;
};

// Adds the rows of one place, from `first` of the order on; returns where the next place begins.
long long add_place(const Rows& rows, long long first, bf16* table, float* sum) {
    const int width = rows.width;
    bf16* row = table + rows.place[first] * width;
#pragma omp simd
    for (int i = 0; i < width; i++) sum[i] = to_f(row[i]);
    long long next = first;
    for (; next < rows.count && rows.place[next] == rows.place[first]; next++) {
        const bf16* value = rows.values + rows.order[next] * width;
#pragma omp simd
        for (int i = 0; i < width; i++) sum[i] += to_f(value[i]);
    }
#pragma omp simd
    for (int i = 0; i < width; i++) row[i] = from_f<bf16>(sum[i]);
    return next;
}

// The first row at or behind `at` that begins a place.
long long next_place(const Rows& rows, long long at) {
    while (at > 0 && at < rows.count && rows.place[at] == rows.place[at - 1]) at++;
    return at;
}

}  // namespace

extern "C" void add_rows_bf16(bf16* table, const bf16* values, const long long* place, const long long* order,
                              long long count, int width, int threads) {
    const Rows rows{values, place, order, count, width};
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<float[]> sum(new float[width]);
        const int thread = omp_get_thread_num(), all = omp_get_num_threads();
        const long long end = next_place(rows, count * (thread + 1) / all);
        long long at = next_place(rows, count * thread / all);
        while (at < end) at = add_place(rows, at, table, sum.get());
    }
}
