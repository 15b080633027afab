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
    Ahead ahead(p.rows_of_panel(panel + 1), ceil_div(T, MR));
    for (int64_t t = 0; t < T; t += MR) {
      ahead.fetch();
      tile(true, r, down + t * r, MR, up, NR, out + t * NR, NR, T - t, NR);
    }
  }
}

// Floats of room that the rows need beside what they write to.
inline int64_t room_for_projection(const Projection& p, int64_t rows) {
  return slices_size(rows, p.terms()) + p.panel_size() + packing_size(p) +
         slices_size(rows, p.rank()) + NR * p.rank() + rows * NR;
}

// Where a product goes: to rows of an output, each of which gets the bias, or to rows that are kept,
// `stride` apart.
struct Result {
  View out, bias;
  bool large;
  float* kept;
  int64_t stride;

  static Result leaving_to(const View& out, const View& bias, bool large) {
    return {out, bias, large, nullptr, 0};
  }
  static Result kept_in(float* rows, int64_t stride) {
    return {View(), View(), false, rows, stride};
  }

  // `cols` columns from j on; `room` is for NR values of each row.
  Strip columns(int64_t j, int64_t cols, float* room) const {
    if (kept != nullptr) return {kept + j, stride, cols};
    Strip strip{room, NR, cols, Target(columns_of(out, j, cols), large)};
    if (bias) read_row(columns_of(bias, j, cols), 0, strip.bias);
    return strip;
  }
};

// Panels of A or of Bᵀ of the group whose bands a thread works on: many bands are of the same.
class LowRankPanels {
 public:
  explicit LowRankPanels(float* room) : panels_(room) {}
  // Apart from its callers, whose loops the compiler would otherwise make slower.
  [[gnu::noinline]] const float* of(int64_t group, const View& down) {
    if (group == group_) return panels_;
    group_ = group;
    for (int64_t j = 0; j < down.rows; j += NR)
      pack<NR>(down, j, smaller(NR, down.rows - j), 0, down.cols, panels_ + j * down.cols);
    return panels_;
  }

 private:
  float* panels_;
  int64_t group_ = -1;
};

// s (rows × low_rank_stride) = scaling · a downᵀ, of slices of a and panels of down.
inline void low_rank_rows(const View& down, float scaling, int64_t rows, const float* slices,
                          const float* panels, float* s) {
  const int64_t stride = low_rank_stride(down.rows);
  Ahead nothing;
  for (int64_t j = 0; j < down.rows; j += NR)
    times_panel(false, true, rows, down.cols, slices, panels + j * down.cols,
                Strip{s + j, stride, NR}, nothing);
  for (int64_t i = 0; i < rows * stride; ++i) s[i] *= scaling;
}

// The rows scaling · a downᵀ: where they go, and the panels of down.
struct LowRank {
  float* s;
  const float* panels;
};

// `packed`: all panels of the weight, or null to pack them one by one on the way, which a band that
// is all of its group does without a detour through memory; then the rows of the next panel are
// fetched meanwhile, otherwise those of `next`. `low_rank`: where that part is live or wanted. Without
// a result nothing else is computed.
inline void project(const Projection& p, const View& a, const float* packed,
                    const LowRank* low_rank, const Result* result, const View& next, float* room) {
  const int64_t rows = a.rows, T = p.terms(), r = p.rank(), N = p.weight.rows;
  float* slices = room;
  float* panel = slices + slices_size(rows, T);
  float* packing = panel + NR * T;
  float* s_slices = packing + packing_size(p);
  float* up = s_slices + slices_size(rows, r);
  float* sums = up + NR * r;
  pack_slices(a, slices);
  if (low_rank != nullptr)
    low_rank_rows(p.down, p.scaling, rows, slices, low_rank->panels, low_rank->s);
  if (result == nullptr) return;
  const int64_t stride = low_rank_stride(r);
  if (packed == nullptr) prepare_packing(p, packing);
  if (p.live()) pack_slices({low_rank->s, DType::f32, rows, r, stride, 1}, s_slices);
  const int64_t tiles = tiles_of(rows, T);
  Ahead ahead(next, p.panels() * tiles);
  for (int64_t j = 0; j < N; j += NR) {
    const int64_t cols = smaller(NR, N - j);
    const float* b = packed + j / NR * p.panel_size();
    if (packed == nullptr) {
      pack_panels(p, j / NR, j / NR + 1, panel, packing);
      b = panel;
      ahead = Ahead(p.rows_of_panel(j / NR + 1), tiles);
    }
    const Strip strip = result->columns(j, cols, sums);
    times_panel(false, !p.live(), rows, T, slices, b, strip, ahead);
    if (!p.live()) continue;
    pack<NR>(p.up, j, cols, 0, r, up);
    times_panel(true, true, rows, r, s_slices, up, strip, ahead);
  }
}

}  // namespace snk::cpu::SNK_ISA
