// A band of rows through the two products of a stitch: c = a Wᵀ + scaling · (a downᵀ) upᵀ.
#pragma once

#include "cpu/gemm.h"

namespace snk::cpu::SNK_ISA {

// The forward takes rows of x with (W, A, B), the backward rows of the gradient of y with
// (Wᵀ, Bᵀ, Aᵀ). `merged`: the low-rank part is added to the packed weight, not to the rows.
struct Projection {
  View weight, down, up;  // N × T, r × T, N × r
  float scaling = 1;
  bool merged = false;

  int64_t terms() const { return weight.cols; }
  int64_t panels() const { return ceil_div(weight.rows, NR); }
  // The rows of the weight that a panel is made of; none of one behind the last.
  View rows_of_panel(int64_t panel) const {
    const int64_t first = smaller(panel * NR, weight.rows);
    return rows_of(weight, first, smaller(NR, weight.rows - first));
  }
  int64_t panel_size() const { return NR * weight.cols; }
  int64_t rank() const { return down.rows; }  // also where T = 0, so that there is no memory
  bool live() const { return rank() > 0 && !merged; }
};

// Floats apart in the low-rank intermediate, whose rows are padded with zeros to whole panels.
inline int64_t low_rank_stride(int64_t rank) { return round_up(rank, NR); }

// Packs panels [begin, end) of W, or of W + scaling · up down. `room`: packing_size floats, which
// prepare_packing filled.
inline int64_t packing_size(const Projection& p) {
  return p.merged ? slices_size(p.terms(), p.rank()) + NR * p.rank() : 0;
}
inline void prepare_packing(const Projection& p, float* room) {
  if (p.merged) pack_slices(p.down.transposed(), room);
}
inline void pack_panels(const Projection& p, int64_t begin, int64_t end, float* out, float* room) {
  const int64_t T = p.terms(), r = p.rank();
  float *down = room, *up = room + slices_size(T, r);
  for (int64_t panel = begin; panel < end; ++panel, out += p.panel_size()) {
    const int64_t j = panel * NR, cols = smaller(NR, p.weight.rows - j);
    pack<NR>(p.weight, j, cols, 0, T, out);
    if (!p.merged) continue;
    pack<NR>(p.up, j, cols, 0, r, up);
    for (int64_t i = 0; i < r * NR; ++i) up[i] *= p.scaling;
    for (int64_t t = 0; t < T; t += MR)
      tile(true, r, down + t * r, MR, up, NR, out + t * NR, NR, T - t, NR);
  }
}

// Floats of room that the rows need beside what they write to.
inline int64_t room_for_low_rank(int64_t rows, int64_t terms) {
  return slices_size(rows, terms) + NR * terms;
}
inline int64_t room_for_projection(const Projection& p, int64_t rows) {
  return room_for_low_rank(rows, p.terms()) + packing_size(p) + slices_size(rows, p.rank()) +
         NR * p.rank();
}

// s (rows × low_rank_stride) = scaling · a downᵀ, of slices of a.
inline void low_rank_rows(const View& down, float scaling, int64_t rows, const float* slices,
                          float* s, float* panel) {
  const int64_t stride = low_rank_stride(down.rows);
  for (int64_t j = 0; j < down.rows; j += NR) {
    pack<NR>(down, j, smaller(NR, down.rows - j), 0, down.cols, panel);
    times_panel(false, rows, down.cols, slices, panel, s + j, stride, NR);
  }
  for (int64_t i = 0; i < rows * stride; ++i) s[i] *= scaling;
}

// `packed`: all panels of the weight, or null to pack them one by one on the way, which a band that
// is all of its group does without a detour through memory. `s`, the rows of scaling · a downᵀ, is
// where the live low-rank part is computed, or null if that is neither live nor wanted. `c` may be
// null where only s is wanted.
inline void project(const Projection& p, const View& a, const float* packed, float* s, float* c,
                    int64_t ldc, float* room) {
  const int64_t rows = a.rows, T = p.terms(), r = p.rank(), N = p.weight.rows;
  float* slices = room;
  float* panel = slices + slices_size(rows, T);
  float* packing = panel + NR * T;
  float* s_slices = packing + packing_size(p);
  float* up = s_slices + slices_size(rows, r);
  pack_slices(a, slices);
  if (s != nullptr) low_rank_rows(p.down, p.scaling, rows, slices, s, panel);
  if (c == nullptr) return;
  const int64_t stride = low_rank_stride(r);
  if (packed == nullptr) prepare_packing(p, packing);
  if (p.live()) pack_slices({s, DType::f32, rows, r, stride, 1}, s_slices);
  for (int64_t j = 0; j < N; j += NR) {
    const int64_t cols = smaller(NR, N - j);
    const float* b = packed + j / NR * p.panel_size();
    if (packed == nullptr) {
      pack_panels(p, j / NR, j / NR + 1, panel, packing);
      b = panel;
    }
    times_panel(false, rows, T, slices, b, c + j, ldc, cols,
                Ahead(packed == nullptr ? p.rows_of_panel(j / NR + 1) : View{}));
    if (!p.live()) continue;
    pack<NR>(p.up, j, cols, 0, r, up);
    times_panel(true, rows, r, s_slices, up, c + j, ldc, cols);
  }
}

}  // namespace snk::cpu::SNK_ISA
