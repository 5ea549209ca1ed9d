// Layer normalisation (Ba et al. 2016) with dropout and the residual sum around it, as in cpu/layer_norm.cpp. A team of
// TEAM threads, a warp or for wide rows the block, takes a row and keeps it in registers: thread t of the team holds
// the packs t, t + TEAM and so on.
//
// A row is a multiple of 16 bytes and at most TEAM * PACKS packs. Weight and bias may start anywhere (they are parts of
// flat buffers); everything else starts at 16 bytes. Bytes a token are counted in cuda/normalisation.py.
#pragma once
#include "common.cuh"
#include "dropout.cuh"

#define NORM_DROPOUTS                                                                                                \
    uint32_t inner_seed, uint32_t inner_threshold, float inner_scale, uint32_t outer_seed, uint32_t outer_threshold, \
        float outer_scale

// Calls work(j, column) for each pack of the row that this thread holds: the j-th of its own, from `column` on.
template <class T, int TEAM, int PACKS, class Work>
__device__ __forceinline__ void for_packs(int width, Work work) {
    constexpr int N = 16 / sizeof(T);
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const int column = (int(threadIdx.x) % TEAM + j * TEAM) * N;
        if (column < width) work(j, column);
    }
}

// Sums over a team, in each of its threads. `slot`, 0 or 1, must alternate from call to call: a thread may be one call
// ahead of another that still reads.
template <int THREADS, int TEAM>
__device__ __forceinline__ Sums team_sums(Sums x, int slot) {
    static_assert(TEAM == WARP || TEAM == THREADS, "a team is a warp or the block");
    constexpr int WARPS = THREADS / WARP;
    x = {warp_sum(x.a), warp_sum(x.b)};
    if constexpr (TEAM == WARP) return x;
    SHARED(Sums, partial, 2 * WARPS);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (lane == 0) partial[slot * WARPS + warp] = x;
    __syncthreads();
    x = lane < WARPS ? partial[slot * WARPS + lane] : Sums{0.f, 0.f};
    return {warp_sum(x.a), warp_sum(x.b)};
}

// What a thread holds of a row.
template <class T, int TEAM, int PACKS>
struct RowPacks {
    static constexpr int N = 16 / sizeof(T);
    Pack<T, N> pack[PACKS];

    __device__ __forceinline__ void load(const T* row, int width) {
        for_packs<T, TEAM, PACKS>(width, [&](int j, int column) { pack[j] = pack_at<T, N>(row + column); });
    }
};

// z = dropout(x) + residual in place of x, written to `kept`. Rounded before it is normalised, as without fusion; the
// backward pass sees the same.
template <class T, int TEAM, int PACKS>
__device__ __forceinline__ void add_residual(RowPacks<T, TEAM, PACKS>& z, const T* residual, T* kept, int width,
                                             uint32_t key, const Dropout& dropout) {
    constexpr int N = 16 / sizeof(T);
    RowPacks<T, TEAM, PACKS> added;
    added.load(residual, width);
    for_packs<T, TEAM, PACKS>(width, [&](int j, int column) {
        const uint32_t bits = kept_bits<N>(key, column, dropout);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float x = to_f(z.pack[j].v[k]) * dropout_factor(bits, k, dropout.scale);
            z.pack[j].v[k] = from_f<T>(x + to_f(added.pack[j].v[k]));
        }
        pack_at<T, N>(kept + column) = z.pack[j];
    });
}

struct NormStatistics {
    float mean, inv_std;
};

// Of a row, in each of its threads.
template <int THREADS, class T, int TEAM, int PACKS>
__device__ __forceinline__ NormStatistics norm_statistics(const RowPacks<T, TEAM, PACKS>& z, int width, float eps) {
    constexpr int N = 16 / sizeof(T);
    float sum = 0.f, squares = 0.f;
    for_packs<T, TEAM, PACKS>(width, [&](int j, int) {
#pragma unroll
        for (int k = 0; k < N; k++) sum += to_f(z.pack[j].v[k]);
    });
    const float mean = team_sums<THREADS, TEAM>({sum, 0.f}, 0).a / width;
    for_packs<T, TEAM, PACKS>(width, [&](int j, int) {
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float centred = to_f(z.pack[j].v[k]) - mean;
            squares += centred * centred;
        }
    });
    return {mean, norm_inv_std(team_sums<THREADS, TEAM>({squares, 0.f}, 1).a, width, eps)};
}

// residual, z and bias may be null: without a residual x is what is normalised, and none of it may be dropped.
// statistics [2, rows]: mean, then 1 / standard deviation.
template <class T, int THREADS, int TEAM, int PACKS>
__global__ void __launch_bounds__(THREADS)
    layer_norm(const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ weight,
               const T* __restrict__ bias, T* __restrict__ z, T* __restrict__ out, float* __restrict__ statistics,
               long long rows, int width, float eps, NORM_DROPOUTS) {
    constexpr int N = 16 / sizeof(T);
    const long long row = (long long)(blockIdx.x) * (THREADS / TEAM) + threadIdx.x / TEAM;
    if (row >= rows) return;
    const size_t start = size_t(row) * width;
    RowPacks<T, TEAM, PACKS> kept;
    kept.load(x + start, width);
    if (residual) {
        const Dropout inner{inner_seed, inner_threshold, inner_scale};
        add_residual(kept, residual + start, z + start, width, row_key(inner_seed, uint32_t(row)), inner);
    }
    const NormStatistics of = norm_statistics<THREADS>(kept, width, eps);
    if (threadIdx.x % TEAM == 0) {
        statistics[row] = of.mean;
        statistics[rows + row] = of.inv_std;
    }
    const Dropout outer{outer_seed, outer_threshold, outer_scale};
    const uint32_t key = row_key(outer_seed, uint32_t(row));
    const bool whole = aligned(weight, 0) && aligned(bias, 0);
    for_packs<T, TEAM, PACKS>(width, [&](int j, int column) {
        const Pack<T, N> w = load_pack<T, N>(weight + column, whole);
        Pack<T, N> b{};
        if (bias) b = load_pack<T, N>(bias + column, whole);
        const uint32_t bits = kept_bits<N>(key, column, outer);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float normal = norm_normal(to_f(kept.pack[j].v[k]), of.mean, of.inv_std);
            const float y = norm_output(normal, to_f(w.v[k]), to_f(b.v[k]));
            kept.pack[j].v[k] = from_f<T>(y * dropout_factor(bits, k, outer.scale));
        }
        pack_at<T, N>(out + start + column) = kept.pack[j];
    });
}

// What a thread has summed of its columns: the gradients of weight and bias.
template <int COLUMNS>
struct ColumnSums {
    float of_weight[COLUMNS], of_bias[COLUMNS];
};

template <class T>
struct NormBackward {
    const T *grad, *grad_z, *z, *weight;  // grad_z, the gradient that z has from elsewhere, may be null
    const float *mean, *inv_std;
    T *grad_x, *grad_sum;  // grad_x is null where nothing of x was dropped: the same
    int width;
    Dropout inner, outer;
};

// The gradient of z in the place of that of the result, and from there to memory: that of the residual, and dropped out
// that of x.
template <class T, int TEAM, int PACKS>
__device__ __forceinline__ void store_gradients(const NormBackward<T>& n, size_t place, int column, uint32_t key,
                                                Pack<T, 16 / sizeof(T)>& dz) {
    constexpr int N = 16 / sizeof(T);
    pack_at<T, N>(n.grad_sum + place) = dz;
    if (!n.grad_x) return;
    const uint32_t bits = kept_bits<N>(key, column, n.inner);
#pragma unroll
    for (int k = 0; k < N; k++) dz.v[k] = from_f<T>(to_f(dz.v[k]) * dropout_factor(bits, k, n.inner.scale));
    pack_at<T, N>(n.grad_x + place) = dz;
}

// The gradient of one row; adds to the sums over rows.
template <class T, int THREADS, int TEAM, int PACKS, int COLUMNS>
__device__ __forceinline__ void norm_backward_row(const NormBackward<T>& n, long long row, int slot,
                                                  ColumnSums<COLUMNS>& sums) {
    constexpr int N = 16 / sizeof(T);
    const size_t start = size_t(row) * n.width;
    const bool whole = aligned(n.weight, 0);
    RowPacks<T, TEAM, PACKS> grad, z;
    grad.load(n.grad + start, n.width);
    z.load(n.z + start, n.width);
    const float mean = n.mean[row], inv_std = n.inv_std[row];
    const uint32_t outer_key = row_key(n.outer.seed, uint32_t(row)), inner_key = row_key(n.inner.seed, uint32_t(row));
    uint32_t kept[PACKS];
    Sums total{0.f, 0.f};
    for_packs<T, TEAM, PACKS>(n.width, [&](int j, int column) {
        const Pack<T, N> w = load_pack<T, N>(n.weight + column, whole);
        kept[j] = kept_bits<N>(outer_key, column, n.outer);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float dy = to_f(grad.pack[j].v[k]) * dropout_factor(kept[j], k, n.outer.scale);
            const float normal = norm_normal(to_f(z.pack[j].v[k]), mean, inv_std), scaled = dy * to_f(w.v[k]);
            sums.of_weight[j * N + k] += dy * normal;
            sums.of_bias[j * N + k] += dy;
            total.a += scaled;
            total.b += scaled * normal;
        }
    });
    total = team_sums<THREADS, TEAM>(total, slot);
    const float mean_scaled = total.a / n.width, mean_product = total.b / n.width;
    for_packs<T, TEAM, PACKS>(n.width, [&](int j, int column) {
        const Pack<T, N> w = load_pack<T, N>(n.weight + column, whole);
        Pack<T, N> more{};
        if (n.grad_z) more = pack_at<T, N>(n.grad_z + start + column);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float dy = to_f(grad.pack[j].v[k]) * dropout_factor(kept[j], k, n.outer.scale);
            const float normal = norm_normal(to_f(z.pack[j].v[k]), mean, inv_std), scaled = dy * to_f(w.v[k]);
            const float dz = norm_grad(scaled, normal, mean_scaled, mean_product, inv_std);
            grad.pack[j].v[k] = from_f<T>(dz + to_f(more.v[k]));
        }
        store_gradients<T, TEAM, PACKS>(n, start + column, column, inner_key, grad.pack[j]);
    });
}

// Adds up the sums of a block's teams, in turn; the last team has the total.
template <int TEAMS, int TEAM, int COLUMNS>
__device__ __forceinline__ void add_teams(ColumnSums<COLUMNS>& sums) {
    SHARED(float, passed, 2 * COLUMNS * TEAM);
    const int place = threadIdx.x % TEAM, team = threadIdx.x / TEAM;
    for (int turn = 0; turn < TEAMS; turn++) {
        if (team == turn) {
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                float &of_weight = passed[2 * i * TEAM + place], &of_bias = passed[(2 * i + 1) * TEAM + place];
                if (turn) {
                    sums.of_weight[i] += of_weight;
                    sums.of_bias[i] += of_bias;
                }
                of_weight = sums.of_weight[i];
                of_bias = sums.of_bias[i];
            }
        }
        __syncthreads();
    }
}

// Team t of all teams of the grid takes the rows t, t + their number and so on. partial [blocks, 2, width]: the
// gradients of weight and bias from each block's rows.
template <class T, int THREADS, int TEAM, int PACKS>
__global__ void __launch_bounds__(THREADS, 2)
    layer_norm_backward(const T* __restrict__ grad, const T* __restrict__ grad_z, const T* __restrict__ z,
                        const T* __restrict__ weight, const float* __restrict__ statistics, T* __restrict__ grad_x,
                        T* __restrict__ grad_sum, float* __restrict__ partial, long long rows, int width, int blocks,
                        NORM_DROPOUTS) {
    constexpr int N = 16 / sizeof(T), TEAMS = THREADS / TEAM;
    const Dropout inner{inner_seed, inner_threshold, inner_scale}, outer{outer_seed, outer_threshold, outer_scale};
    const float *mean = statistics, *inv_std = statistics + rows;
    const NormBackward<T> n{grad, grad_z, z, weight, mean, inv_std, grad_x, grad_sum, width, inner, outer};
    const int team = threadIdx.x / TEAM;
    ColumnSums<PACKS * N> sums{};
    int slot = 0;
    for (long long row = (long long)(blockIdx.x) * TEAMS + team; row < rows; row += (long long)(blocks)*TEAMS) {
        norm_backward_row<T, THREADS, TEAM, PACKS>(n, row, slot, sums);
        slot ^= 1;
    }
    if constexpr (TEAMS > 1) add_teams<TEAMS, TEAM>(sums);
    if (team < TEAMS - 1) return;
    float* of_weight = partial + size_t(blockIdx.x) * 2 * width;
    for_packs<T, TEAM, PACKS>(width, [&](int j, int column) {
#pragma unroll
        for (int k = 0; k < N; k += 4) {
            const float *w = sums.of_weight + j * N + k, *b = sums.of_bias + j * N + k;
            pack_at<float, 4>(of_weight + column + k) = {{w[0], w[1], w[2], w[3]}};
            pack_at<float, 4>(of_weight + width + column + k) = {{b[0], b[1], b[2], b[3]}};
        }
    });
}
