#include "gelu_lanes.h"

#include "lanes.h"

#ifdef HAS_LANES
namespace {

inline Lanes at_most(Lanes x, float bound) { return _mm512_min_ps(_mm512_set1_ps(bound), x); }
inline Lanes at_least(Lanes x, float bound) { return _mm512_max_ps(_mm512_set1_ps(bound), x); }

}  // namespace

// Behind the bounds of vectors, which its templates find only if they are declared by now.
#include "../gelu.cuh"

bool gelu_lanes_usable(int width) { return lanes_usable() && width % kLanes == 0; }

void gelu_row_lanes(const bf16* x, const bf16* bias, bf16* out, int width) {
    for (int i = 0; i < width; i += kLanes) store_bf16(out + i, gelu_of(load_bf16(x + i) + load_bf16(bias + i)));
}

void gelu_grad_row_lanes(const bf16* grad, const bf16* x, const bf16* bias, bf16* grad_x, float* sum, int width) {
    for (int i = 0; i < width; i += kLanes) {
        const Lanes slope = load_bf16(grad + i) * gelu_slope(load_bf16(x + i) + load_bf16(bias + i));
        store_bf16(grad_x + i, slope);
        _mm512_storeu_ps(sum + i, _mm512_loadu_ps(sum + i) + slope);
    }
}

void geglu_row_lanes(const bf16* x, bf16* out, int width) {
    for (int i = 0; i < width; i += kLanes) store_bf16(out + i, gelu_of(load_bf16(x + i)) * load_bf16(x + width + i));
}

void geglu_grad_row_lanes(const bf16* grad, const bf16* x, bf16* grad_x, int width) {
    for (int i = 0; i < width; i += kLanes) {
        const Lanes v = load_bf16(x + i), slope = load_bf16(grad + i);
        store_bf16(grad_x + i, slope * load_bf16(x + width + i) * gelu_slope(v));
        store_bf16(grad_x + width + i, slope * gelu_of(v));
    }
}
#else
bool gelu_lanes_usable(int) { return false; }
void gelu_row_lanes(const bf16*, const bf16*, bf16*, int) {}
void gelu_grad_row_lanes(const bf16*, const bf16*, const bf16*, bf16*, float*, int) {}
void geglu_row_lanes(const bf16*, bf16*, int) {}
void geglu_grad_row_lanes(const bf16*, const bf16*, bf16*, int) {}
#endif
