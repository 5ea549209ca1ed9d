// Runs each kind of kernel once on heap buffers of exactly the right size, for builds with a sanitizer:
// `sanitize SCHEDULE`. Fails on what the emulator finds and on a result that isn't finite.
#include <cstdio>

#include "kernels.cpp"

namespace {

int schedule = 0;
bool failed = false;

void fail(const char* kernel, const std::string& what) {
    std::printf("%s: %s\n", kernel, what.c_str());
    failed = true;
}

template <class... A>
void run(const char* kernel, unsigned blocks, unsigned threads, A... arguments) {
    void* pointers[] = {&arguments...};
    const std::string error = emulate(kernel, blocks, threads, pointers, schedule, 1);
    if (!error.empty()) fail(kernel, error);
}

// `count` numbers in -1 .. 1 that don't repeat soon.
template <class T>
std::vector<T> numbers(size_t count) {
    std::vector<T> made(count);
    for (size_t i = 0; i < count; i++) made[i] = from_f<T>(float(i * 2654435761u % 65536u) / 32768.f - 1.f);
    return made;
}

template <class T>
void check_finite(const char* kernel, const std::vector<T>& values) {
    for (const T& value : values) {
        if (!is_finite(to_f(value))) return fail(kernel, "a result isn't finite");
    }
}

template <class T>
void cross_entropy(const char* kernel, int classes, unsigned threads) {
    const std::vector<long long> target{0, -100, classes - 1};  // the last row, at the buffer's end, is scored
    const unsigned rows = unsigned(target.size());
    std::vector<T> logits = numbers<T>(rows * size_t(classes));
    std::vector<float> loss(rows, NAN);
    const std::vector<float> scale{0.5f};
    const std::unique_ptr<bool[]> hit(new bool[rows]);
    std::vector<int> in_range{1};
    run(kernel, rows, threads, logits.data(), (long long)classes, classes, target.data(), scale.data(), loss.data(),
        hit.get(), in_range.data(), -100ll, 0.1f, true);
    check_finite(kernel, logits);
    check_finite(kernel, loss);
}

// Rows that fill neither a block nor a group, columns that fill no tile; sums of two groups.
struct Activations {
    static constexpr int rows = 67, width = 264, group_rows = 64;
    static constexpr unsigned blocks = 4;  // two tiles, two groups
    const std::vector<bf16> x = numbers<bf16>(rows * 2 * width), grad = numbers<bf16>(rows * width);
    const std::vector<bf16> bias = numbers<bf16>(width);
    std::vector<bf16> out = numbers<bf16>(rows * width), grad_x = numbers<bf16>(rows * 2 * width);
    std::vector<float> partial = std::vector<float>(2 * width, NAN);

    void bias_gelu() {
        run("bias_gelu<bf16, 256>", blocks, 256, x.data(), bias.data(), out.data(), rows, width, group_rows);
        check_finite("bias_gelu", out);
        run("bias_gelu_backward<bf16, 256>", blocks, 256, grad.data(), x.data(), bias.data(), out.data(),
            partial.data(), rows, width, group_rows);
        check_finite("bias_gelu_backward", out);
        check_partial("bias_gelu_backward");
    }
    void geglu() {
        run("geglu<bf16, 256>", blocks, 256, x.data(), out.data(), rows, width, group_rows);
        check_finite("geglu", out);
        run("geglu_backward<bf16, 256>", blocks, 256, grad.data(), x.data(), grad_x.data(), rows, width, group_rows);
        check_finite("geglu_backward", grad_x);
    }
    void column_sum() {
        run("column_sum<bf16, 256>", blocks, 256, grad.data(), partial.data(), rows, width, group_rows);
        check_partial("column_sum");
    }
    // What `sum_partials` would add up.
    void check_partial(const char* kernel) {
        check_finite(kernel, partial);
        partial.assign(partial.size(), NAN);
    }
};

// Two segments, the second unaligned and in two chunks, with a gap between.
struct Optimizer {
    static constexpr size_t elements = 3 + 2 + 1000;
    std::vector<float> param = numbers<float>(elements), exp_avg = numbers<float>(elements);
    std::vector<float> exp_avg_sq = std::vector<float>(elements, 1.f);
    std::vector<bf16> grad = numbers<bf16>(elements), copy = numbers<bf16>(elements);
    const std::vector<long long> begin{0, 5, 905};
    const std::vector<int> size{3, 900, 100}, owner{0, 1, 1}, first{0, 1, 3};
    const std::vector<float> decay{0.f, 0.01f}, scale{0.25f};
    const std::unique_ptr<bool[]> trust{new bool[2]{true, true}};
    std::vector<Sums> partial = std::vector<Sums>(3);
    std::vector<float> ratio = std::vector<float>(2, NAN), norm = std::vector<float>(1, NAN);
    std::vector<double> squares = std::vector<double>(4, NAN);
    std::vector<int> nonfinite{0};

    void adamw() {
        run("adamw<bf16, bf16, 256>", 3, 256, param.data(), grad.data(), exp_avg.data(), exp_avg_sq.data(), copy.data(),
            begin.data(), size.data(), owner.data(), decay.data(), 1e-3f, scale.data(), 0.9f, 0.1f, 0.99f, 0.01f, 1e-6f,
            1.f, 1.f, nonfinite.data());
        check_finite("adamw", param);
    }
    void lamb() {
        run("lamb_moments<bf16, 256>", 3, 256, param.data(), grad.data(), exp_avg.data(), exp_avg_sq.data(),
            begin.data(), size.data(), owner.data(), decay.data(), scale.data(), 0.9f, 0.1f, 0.99f, 0.01f, 1e-6f, 1.f,
            1.f, partial.data(), nonfinite.data());
        run("lamb_ratios<256>", 2, 256, partial.data(), first.data(), decay.data(), trust.get(), 10.f, true,
            ratio.data());
        run("lamb_squares<256>", 2, 256, partial.data(), first.data(), squares.data());
        run("lamb_update<bf16, bf16, 256>", 3, 256, param.data(), grad.data(), exp_avg.data(), exp_avg_sq.data(),
            copy.data(), begin.data(), size.data(), owner.data(), decay.data(), 1e-3f, scale.data(), 0.9f, 0.1f, 0.99f,
            0.01f, 1e-6f, 1.f, 1.f, ratio.data(), nonfinite.data());
        check_finite("lamb", ratio);
        check_finite("lamb", std::vector<float>(squares.begin(), squares.end()));
        check_finite("lamb", param);
    }
    void global_norm() {
        std::vector<float> squares(3, NAN);
        run("squared_norms<bf16, 256>", 3, 256, grad.data(), begin.data(), size.data(), squares.data());
        run("norm_of_chunks<1024>", 1, 1024, squares.data(), 3, norm.data());
        check_finite("global_norm", norm);
    }
};

// Rows with dropout before and after, of a width that leaves threads without a pack; several rows a team in the
// backward pass.
template <class T>
void normalise(const std::string& shape, int width, unsigned blocks) {
    constexpr int rows = 5, backward_blocks = 2;
    constexpr unsigned seed = 7, threshold = 1u << 29;
    const size_t elements = size_t(rows) * width;
    const std::vector<T> x = numbers<T>(elements), residual = numbers<T>(elements), grad = numbers<T>(elements);
    const std::vector<T> weight = numbers<T>(width), bias = numbers<T>(width);
    std::vector<T> z(elements), out(elements), grad_x(elements), grad_sum(elements);
    std::vector<float> statistics(2 * rows, NAN), partial(backward_blocks * 2 * width, NAN);
    run(("layer_norm" + shape).c_str(), blocks, 128, x.data(), residual.data(), weight.data(), bias.data(), z.data(),
        out.data(), statistics.data(), (long long)rows, width, 1e-6f, seed, threshold, 1.1f, seed + 1, threshold, 1.1f);
    run(("layer_norm_backward" + shape).c_str(), backward_blocks, 128, grad.data(), grad.data(), z.data(),
        weight.data(), statistics.data(), grad_x.data(), grad_sum.data(), partial.data(), (long long)rows, width,
        backward_blocks, seed, threshold, 1.1f, seed + 1, threshold, 1.1f);
    for (const std::vector<T>* made : {&out, &grad_x, &grad_sum}) check_finite("layer_norm", *made);
    check_finite("layer_norm", statistics);
    check_finite("layer_norm", partial);
}

// Few blocks, as each of their threads is one of ThreadSanitizer's 8,128.
void sum_partials_of_parts() {
    constexpr int parts = 37, width = 70;
    const std::vector<float> partial = numbers<float>(parts * width);
    std::vector<float> sums(width, NAN);
    run("sum_partials<float, 1024>", 3, 1024, partial.data(), parts, width, sums.data());
    check_finite("sum_partials", sums);
}

}  // namespace

int main(int, char** arguments) {
    schedule = std::atoi(arguments[1]);
    cross_entropy<bf16>("xent_streaming<bf16, 256>", 1003, 256);
    cross_entropy<float>("xent_registers<float, 1024, 4>", 5001, 1024);
    Activations activations;
    activations.bias_gelu();
    activations.geglu();
    activations.column_sum();
    Optimizer optimizer;
    optimizer.adamw();
    optimizer.lamb();
    optimizer.global_norm();
    sum_partials_of_parts();
    normalise<bf16>("<bf16, 128, 32, 2>", 264, 2);
    normalise<float>("<float, 128, 128, 2>", 516, 5);
    return failed;
}
