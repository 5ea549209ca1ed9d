// Rows of GELU by vectors where the CPU has AVX512-BF16, which rounds sixteen numbers by one instruction.
#pragma once
#include "../types.cuh"

// Whether the functions below take rows of a width.
bool gelu_lanes_usable(int width);

// out = GELU(x + bias).
void gelu_row_lanes(const bf16* x, const bf16* bias, bf16* out, int width);

// grad_x = grad times the slope at x + bias; `sum` adds it up.
void gelu_grad_row_lanes(const bf16* grad, const bf16* x, const bf16* bias, bf16* grad_x, float* sum, int width);

// out [width] = GELU of the first half of x [2 width] times the second half.
void geglu_row_lanes(const bf16* x, bf16* out, int width);

// grad_x [2 width].
void geglu_grad_row_lanes(const bf16* grad, const bf16* x, bf16* grad_x, int width);
