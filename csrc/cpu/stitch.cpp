// y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ and LN(y), forward and backward, for rows in groups with a
// stitch each. One stitch is one group.
#include "cpu/norms.h"
#include "cpu/projection.h"

namespace snk::cpu::SNK_ISA {
namespace {

// Rows of a group, panels of its weight or columns of a gradient, for one thread to do.
struct Task {
  int64_t group, begin, end;
};

// A list that keeps its memory between calls.
class Tasks {
 public:
  ~Tasks() { std::free(data_); }
  void clear() { size_ = 0; }
  // False without memory.
  bool add(Task task) {
    if (size_ == room_) {
      const int64_t room = 2 * room_ + 64;
      void* data = std::realloc(data_, room * sizeof(Task));
      if (data == nullptr) return false;
      data_ = static_cast<Task*>(data);
      room_ = room;
    }
    data_[size_++] = task;
    return true;
  }
  // [0, n) in about equal parts, whose borders are multiples of `step`; the last `halved` parts are two
  // each, so that a thread waits less for another at the end.
  bool add_parts(int64_t group, int64_t n, int64_t parts, int64_t step, int64_t halved = 0) {
    const int64_t steps = ceil_div(n, step), halves = 2 * parts;
    for (int64_t i = 0, begin = 0; i < halves;) {
      i += i < halves - 2 * halved ? 2 : 1;
      const int64_t end = smaller(i * steps / halves * step, n);
      if (!add({group, begin, end})) return false;
      begin = end;
    }
    return true;
  }
  // The largest first, so that the threads come to an end together.
  void sort() {
    if (size_ < 2) return;
    std::qsort(data_, size_, sizeof(Task), [](const void* a, const void* b) {
      const Task &s = *static_cast<const Task*>(a), &t = *static_cast<const Task*>(b);
      const int64_t more = (t.end - t.begin) - (s.end - s.begin);
      return more != 0 ? (more > 0 ? 1 : -1) : (s.group != t.group ? (s.group > t.group ? 1 : -1)
                                                                  : (s.begin > t.begin ? 1 : -1));
    });
  }
  int64_t size() const { return size_; }
  const Task& operator[](int64_t i) const { return data_[i]; }

 private:
  Task* data_ = nullptr;
  int64_t size_ = 0, room_ = 0;
};

// Into how many bands a group's rows are cut. One that is no more than a thread's fair share is a
// single band, up to WHOLE rows, which packs the weight panel by panel for itself: of few rows the
// detour of a whole packed weight through memory costs as much as the arithmetic. Others are cut
// lower, so that a band stays in L2, and evenly for the threads that share the group, which find
// the weight packed.
constexpr int64_t HIGH = 8 * MR, WHOLE = 12 * MR;

int64_t bands_of(int64_t rows, int64_t rows_per_thread) {
  if (rows <= WHOLE && rows <= rows_per_thread) return smaller(rows, 1);
  const int64_t sharing = ceil_div(rows, rows_per_thread), slices = ceil_div(rows, MR);
  return smaller(slices, sharing * ceil_div(slices, sharing * (HIGH / MR)));
}

// Whether y = x Wᵀ is better dealt out by columns: the rows go through memory packed, and not the
// weight, each panel of which meets all rows as soon as it is packed. It is for few rows, and also for
// more if the weight is large, its columns are more by a margin, and the caches keep the rows. The
// bounds come from timing both ways at widths 384, 768 and 1024 on two cores.
bool better_by_columns(int64_t rows, const View& weight) {
  constexpr int64_t FEW = 24 * MR, MARGIN = 512, LARGE = 1 << 20;
  return rows <= FEW || (rows + MARGIN <= weight.rows && weight.rows * weight.cols >= LARGE &&
                         !past_caches(rows * weight.cols));
}

// The projections of all groups, in the direction of a pass, and their tasks.
class Plan {
 public:
  // `project(group)` gives the projection, `wanted(group)` says whether the low-rank intermediate
  // is needed for itself, `rows_wanted` whether the projected rows are, `by_columns` whether they may
  // be made column by column. False without memory.
  template <typename Project, typename Wanted>
  bool make(const StitchGroup* groups, int64_t count, int threads, bool rows_wanted,
            bool by_columns, Project project, Wanted wanted) {
    entries_ = reinterpret_cast<Entry*>(memory_.take(count * sizeof(Entry) / sizeof(float)));
    if (entries_ == nullptr) return false;
    bands.clear(), packings.clear(), slicings.clear(), strips.clear();
    int64_t rows = 0, packed = 0;
    for (int64_t g = 0; g < count; ++g) rows += groups[g].last - groups[g].first;
    const int64_t rows_per_thread = ceil_div(rows, threads);
    room_ = highest_ = stride_ = 0;
    for (int64_t g = 0; g < count; ++g) {
      const int64_t M = groups[g].last - groups[g].first;
      const int64_t parts = bands_of(M, larger(rows_per_thread, 1));
      Entry& entry = entries_[g] = {project(groups[g]), -1};
      Projection& p = entry.projection;
      if (by_columns && parts > 1 && p.rank() == 0 && !groups[g].identity() &&
          p.panels() >= threads && better_by_columns(M, p.weight)) {
        entry.packed = packed;
        packed += Parts::padded(slices_size(M, p.terms()));
        room_ = larger(room_, p.panel_size() + M * NR);
        if (!slicings.add_parts(g, M, ceil_div(M, 4 * MR), MR)) return false;
        if (!strips.add_parts(g, p.panels(), p.panels(), 1)) return false;
        continue;
      }
      const bool shared = threads > 1 && parts >= 2 * threads;
      if (!bands.add_parts(g, M, parts, MR, shared ? threads : 0)) return false;
      const int64_t height = parts == 0 ? 0 : ceil_div(ceil_div(M, MR), parts) * MR;
      highest_ = larger(highest_, height);
      stride_ = larger(stride_, low_rank_stride(p.rank()));
      if (M == 0 || groups[g].identity()) continue;
      // With many rows it is less arithmetic to merge the weights first; with few, to run the
      // low-rank part beside them.
      const int64_t N = p.weight.rows, T = p.terms();
      p.merged = rows_wanted && p.rank() > 0 && M * (N + (wanted(groups[g]) ? 0 : T)) >= N * T;
      room_ = larger(room_, room_for_projection(p, height));
      if (parts == 1 || !rows_wanted) continue;
      entry.packed = packed;
      packed += Parts::padded(p.panels() * p.panel_size());
      // Some panels to a task, as each one fetches the next of its own; as many tasks to each thread.
      const int64_t some = round_up(ceil_div(p.panels(), 4), threads);
      if (!packings.add_parts(g, p.panels(), smaller(p.panels(), some), 1)) return false;
    }
    bands.sort();
    packed_ = packed_memory_.take(packed);
    return packed_ != nullptr;
  }

  const Projection& projection(int64_t group) const { return entries_[group].projection; }
  // Threads that are worth waking: one does a single band as fast.
  int threads(int most) const { return bands.size() + strips.size() > 1 ? most : 1; }
  // Null where the weight is not packed beforehand.
  const float* packed(int64_t group) const {
    return entries_[group].packed < 0 ? nullptr : packed_ + entries_[group].packed;
  }
  // `ready`: the group for which the room of this thread is prepared; at first none, −1.
  void pack(const Task& task, float* room, int64_t& ready) const {
    const Entry& entry = entries_[task.group];
    const Projection& p = entry.projection;
    if (ready != task.group) prepare_packing(p, room);
    ready = task.group;
    pack_panels(p, task.begin, task.end, packed_ + entry.packed + task.begin * p.panel_size(), room);
  }
  // Of a group by columns: its rows x as slices, then panels of y = x Wᵀ + b from all slices.
  void slice(const Task& task, const View& x) const {
    const Entry& entry = entries_[task.group];
    pack_slices(rows_of(x, task.begin, task.end - task.begin),
                packed_ + entry.packed + task.begin * entry.projection.terms());
  }
  // A strip is one panel wide.
  void project_strip(const Task& task, const Result& result, int threads, float* room) const {
    const Entry& entry = entries_[task.group];
    const Projection& p = entry.projection;
    const int64_t j = task.begin * NR, cols = smaller(NR, p.weight.rows - j);
    float *panel = room, *sums = room + p.panel_size();
    pack_panels(p, task.begin, task.begin + 1, panel, nullptr);
    const int64_t rows = result.out.rows, T = p.terms();
    // Others take the panels between.
    Ahead ahead(p.rows_of_panel(task.begin + threads), tiles_of(rows, T));
    times_panel(false, true, rows, T, packed_ + entry.packed, panel, result.columns(j, cols, sums),
                ahead);
  }
  // Floats of room that `project` and `pack` need, rows of the highest band, and the widest stride
  // of a low-rank intermediate.
  int64_t room() const { return room_; }
  int64_t highest() const { return highest_; }
  int64_t stride() const { return stride_; }
  void release_if_large() { packed_memory_.release_if_large(); }

  Tasks bands, packings, slicings, strips;

 private:
  struct Entry {
    Projection projection;
    int64_t packed;
  };
  Entry* entries_ = nullptr;
  float* packed_ = nullptr;
  int64_t room_ = 0, highest_ = 0, stride_ = 0;
  Scratch memory_, packed_memory_;
};

}  // namespace

Status stitch_forward(const StitchForward& p) {
  static thread_local Plan plan_of_thread;
  Plan& plan = plan_of_thread;
  const bool made = plan.make(
      p.groups, p.count, p.threads, true, !p.normed,
      [](const StitchGroup& g) { return Projection{g.weight, g.lora_A, g.lora_B, g.scaling}; },
      [](const StitchGroup&) { return false; });
  if (!made) return Status::out_of_memory;
  const int64_t N = p.y.cols, highest = plan.highest();
  // Rows of a band that are kept are a cache line longer than needed: a power of two apart, all rows of
  // a tile would fall into one set of the L1 cache. In an output each line is written once.
  const int64_t ldc = N + 16;
  const bool large = past_caches(p.y.rows * (p.x.cols + (p.normed ? 2 : 1) * N));
  const NormedOutput out{Target(p.y, large), Target(p.normed, large),
                         static_cast<float*>(p.mean.data), static_cast<float*>(p.rstd.data), p.eps};
  bool failed = false;
#pragma omp parallel num_threads(plan.threads(p.threads))
  {
    static thread_local Scratch local;
    const int64_t sizes[] = {plan.room(), highest * plan.stride(), plan.stride() * p.x.cols,
                             highest * ldc, N, N, N};
    Parts parts(local, sizes);
    if (!parts) {
#pragma omp atomic write
      failed = true;
    }
    float *room = parts.take(), *s = parts.take();
    LowRankPanels panels_of_A(parts.take());
    float *band_y = parts.take(), *bias = parts.take();
    float *norm_weight = parts.take(), *norm_bias = parts.take();
    const auto rows_of_group = [&](const View& view, const StitchGroup& group) {
      return rows_of(view, group.first, group.last - group.first);
    };
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < plan.slicings.size(); ++i)
      plan.slice(plan.slicings[i], rows_of_group(p.x, p.groups[plan.slicings[i].group]));
    int64_t ready = -1;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < plan.packings.size(); ++i)
      if (parts) plan.pack(plan.packings[i], room, ready);
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < plan.strips.size(); ++i) {
      if (!parts) continue;
      const StitchGroup& group = p.groups[plan.strips[i].group];
      const Result result = Result::leaving_to(rows_of_group(p.y, group), group.bias, large);
      plan.project_strip(plan.strips[i], result, p.threads, room);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < plan.bands.size(); ++i) {
      if (!parts) continue;
      const Task& band = plan.bands[i];
      const StitchGroup& group = p.groups[band.group];
      const int64_t first = group.first + band.begin, rows = band.end - band.begin;
      float* c = band_y;
      if (group.identity()) {
        for (int64_t k = 0; k < rows; ++k) read_row(p.x, first + k, c + k * ldc);
      } else {
        const Projection& projection = plan.projection(band.group);
        LowRank low_rank{s, nullptr};
        if (projection.live()) low_rank.panels = panels_of_A.of(band.group, projection.down);
        const Result result = p.normed
                                  ? Result::kept_in(c, ldc)
                                  : Result::leaving_to(rows_of(p.y, first, rows), group.bias, large);
        project(projection, rows_of(p.x, first, rows), plan.packed(band.group),
                projection.live() ? &low_rank : nullptr, &result, View(), room);
        if (!p.normed) continue;
      }
      read_or(group.bias, 0.0f, N, bias);
      read_or(group.norm_weight, 1.0f, N, norm_weight);
      read_or(group.norm_bias, 0.0f, N, norm_bias);
      for (int64_t k = 0; k < rows; ++k) {
        float* own = c + k * ldc;
        out.write(
            first + k, N, norm_weight, norm_bias, own,
            [&](auto v, int64_t j) {
              using V = decltype(v);
              return V(get<V>(own + j) + get<V>(bias + j));
            },
            [](int64_t) {});
      }
    }
    stream_fence();
    local.release_if_large();
  }
  plan.release_if_large();
  return failed ? Status::out_of_memory : Status::ok;
}

namespace {

// Where a group's intermediates of the backward begin: sums over rows, scaling · dy B, scaling · x Aᵀ.
struct Intermediates {
  int64_t sums, dy_B, x_A;
};

}  // namespace

// In three steps: the gradient of y and the sums over rows, the weights packed; the gradient of x
// and the low-rank intermediates, band by band; the products over all rows.
Status stitch_backward(const StitchBackward& p) {
  static thread_local Plan plan_of_thread;
  static thread_local Scratch intermediates_memory, grad_memory, low_rank_memory, sums_memory,
      counters_memory;
  static thread_local Tasks blocks_of_thread, dA_of_thread, dB_of_thread, dW_of_thread;
  Plan& plan = plan_of_thread;
  Tasks &blocks = blocks_of_thread, &dA = dA_of_thread, &dB = dB_of_thread, &dW = dW_of_thread;
  const bool norm = bool(p.grad_normed);
  const int64_t M = p.x.rows, K = p.x.cols, N = (norm ? p.grad_normed : p.grad_y).cols;
  const int64_t width = (norm ? 3 : 1) * N;
  const bool made = plan.make(
      p.groups, p.count, p.threads, bool(p.grad_x), false,
      [](const StitchGroup& g) {
        return Projection{g.weight.transposed(), g.lora_B.transposed(), g.lora_A.transposed(),
                          g.scaling};
      },
      [](const StitchGroup& g) { return bool(g.grad_lora_A); });
  auto* places = reinterpret_cast<Intermediates*>(
      intermediates_memory.take(p.count * sizeof(Intermediates) / sizeof(float)));
  if (!made || places == nullptr) return Status::out_of_memory;

  blocks.clear(), dA.clear(), dB.clear(), dW.clear();
  int64_t sums_size = 0, low_rank_size = 0;
  for (int64_t g = 0; g < p.count; ++g) {
    const StitchGroup& group = p.groups[g];
    const int64_t rows = group.last - group.first;
    places[g] = {sums_size, low_rank_size, low_rank_size + rows * plan.stride()};
    bool added = true;
    if (norm || group.grad_bias) {
      sums_size += block_sums_size(rows, width);
      added = blocks.add_parts(g, row_blocks(rows), row_blocks(rows), 1);
    }
    if (group.grad_lora_A || group.grad_lora_B) low_rank_size += 2 * rows * plan.stride();
    if (group.grad_lora_A) added = added && dA.add_parts(g, K, ceil_div(K, OUT_ROWS), OUT_ROWS);
    if (group.grad_lora_B) added = added && dB.add_parts(g, N, ceil_div(N, OUT_ROWS), OUT_ROWS);
    if (group.grad_weight) added = added && dW.add_parts(g, N, ceil_div(N, OUT_ROWS), OUT_ROWS);
    if (!added) return Status::out_of_memory;
  }
  float* sums = sums_memory.take(sums_size);
  float* low_rank = low_rank_memory.take(low_rank_size);
  float* grad_y = norm ? grad_memory.take(M * N) : nullptr;
  if (sums == nullptr || low_rank == nullptr || (norm && grad_y == nullptr))
    return Status::out_of_memory;
  const View dy = norm ? View{grad_y, DType::f32, M, N, N, 1} : p.grad_y;
  const float* mean = static_cast<const float*>(p.mean.data);
  const float* rstd = static_cast<const float*>(p.rstd.data);
  const bool large = past_caches(M * (2 * K + (norm ? 4 : 1) * N));
  const Target grad_x(p.grad_x, large);
  float* counters = counters_memory.take(Shares::room(p.threads));
  if (counters == nullptr) return Status::out_of_memory;
  const Shares shares(blocks.size(), 1, p.threads, counters);
  bool failed = false;

  const auto rows_of_group = [&](const View& view, const StitchGroup& group) {
    return rows_of(view, group.first, group.last - group.first);
  };
  const auto low_rank_view = [&](int64_t begin, const StitchGroup& group) {
    const int64_t rows = group.last - group.first, stride = low_rank_stride(group.lora_A.rows);
    return View{low_rank + begin, DType::f32, rows, stride, stride, 1};
  };

#pragma omp parallel num_threads(plan.threads(p.threads))
  {
    static thread_local Scratch local;
    const int64_t highest = plan.highest();
    const int64_t room_size =
        larger(larger(plan.room(), slices_size(highest, K)),
               transposed_product_size(larger(plan.stride(), dW.size() > 0 ? K : 0)));
    const int64_t sizes[] = {room_size, highest * plan.stride(), plan.stride() * N,
                             plan.stride() * K, K, 3 * N, N, N};
    Parts parts(local, sizes);
    if (!parts) {
#pragma omp atomic write
      failed = true;
    }
    float *room = parts.take(), *band_s = parts.take();
    LowRankPanels panels_of_B(parts.take()), panels_of_A(parts.take());
    float *row_x = parts.take();
    float *room_rows = parts.take(), *zeros = parts.take(), *norm_weight = parts.take();
    if (parts) std::memset(zeros, 0, N * sizeof(float));

    int64_t ready = -1;
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < plan.packings.size(); ++i)
      if (parts) plan.pack(plan.packings[i], room, ready);
    const auto sum_block = [&](int64_t i, int64_t) {
      const StitchGroup& group = p.groups[blocks[i].group];
      read_or(group.norm_weight, 1.0f, N, norm_weight);
      const auto sum_rows = [&](int64_t begin, int64_t end, float* sum_bias) {
        float *sum_weight = sum_bias + N, *sum_norm_bias = sum_weight + N;
        for (int64_t row = group.first + begin; row < group.first + end; ++row) {
          const float* direct = values_or(p.grad_y, row, room_rows + 2 * N, zeros);
          if (!norm) {
            for_values(N, [&](auto v, int64_t j, auto) {
              using V = decltype(v);
              put(sum_bias + j, V(get<V>(sum_bias + j) + get<V>(direct + j)));
            });
            continue;
          }
          const NormedRow values{row_values(p.y, row, room_rows),
                                 row_values(p.grad_normed, row, room_rows + N),
                                 direct,
                                 zeros,
                                 grad_y + row * N,
                                 {mean[row], rstd[row]}};
          normalize_backward(values, N, norm_weight, sum_weight, sum_norm_bias,
                             [&](auto v, auto total, int64_t j) {
                               using V = decltype(v);
                               put(values.grad + j, total);
                               put(sum_bias + j, V(get<V>(sum_bias + j) + total));
                             });
        }
      };
      sum_rows_of_block(blocks[i].begin, group.last - group.first, width,
                        sums + places[blocks[i].group].sums, sum_rows);
    };
#pragma omp for
    for (int thread = 0; thread < p.threads; ++thread)
      if (parts) shares.work(thread, sum_block);

#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < plan.bands.size(); ++i) {
      if (!parts) continue;
      const Task& band = plan.bands[i];
      const StitchGroup& group = p.groups[band.group];
      const Intermediates& place = places[band.group];
      const int64_t first = group.first + band.begin, rows = band.end - band.begin;
      const View dy_rows = rows_of(dy, first, rows), x_rows = rows_of(p.x, first, rows);
      if (group.identity()) {
        for (int64_t k = 0; p.grad_x && k < rows; ++k) {
          read_row(dy_rows, k, row_x);
          grad_x.write(first + k, row_x);
        }
      } else {
        const Projection& projection = plan.projection(band.group);
        const Result result = Result::leaving_to(rows_of(p.grad_x, first, rows), View(), large);
        const int64_t begin = band.begin * low_rank_stride(projection.rank());
        const bool wanted = bool(group.grad_lora_A), low = wanted || (p.grad_x && projection.live());
        LowRank dy_B{wanted ? low_rank + place.dy_B + begin : band_s, nullptr};
        if (low) dy_B.panels = panels_of_B.of(band.group, projection.down);
        if (low || p.grad_x)
          project(projection, dy_rows, plan.packed(band.group), low ? &dy_B : nullptr,
                  p.grad_x ? &result : nullptr, group.grad_lora_B ? x_rows : View(), room);
        if (group.grad_lora_B) {
          pack_slices(x_rows, room);
          low_rank_rows(group.lora_A, group.scaling, rows, room,
                        panels_of_A.of(band.group, group.lora_A), low_rank + place.x_A + begin);
        }
      }
    }

    // dB = scaling · dyᵀ (x Aᵀ), dA = scaling · (dy B)ᵀ x, dW = dyᵀ x
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < dB.size(); ++i) {
      const StitchGroup& group = p.groups[dB[i].group];
      if (parts)
        transposed_product(rows_of_group(dy, group),
                           low_rank_view(places[dB[i].group].x_A, group), dB[i].begin,
                           dB[i].end - dB[i].begin, group.grad_lora_B, room);
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < dA.size(); ++i) {
      const StitchGroup& group = p.groups[dA[i].group];
      if (parts)
        transposed_product(rows_of_group(p.x, group),
                           low_rank_view(places[dA[i].group].dy_B, group), dA[i].begin,
                           dA[i].end - dA[i].begin, group.grad_lora_A.transposed(), room);
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < dW.size(); ++i) {
      const StitchGroup& group = p.groups[dW[i].group];
      if (parts)
        transposed_product(rows_of_group(dy, group), rows_of_group(p.x, group), dW[i].begin,
                           dW[i].end - dW[i].begin, group.grad_weight, room);
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < 3 * p.count; ++i) {
      const StitchGroup& group = p.groups[i / 3];
      const View* const vectors[] = {&group.grad_bias, &group.grad_norm_weight,
                                     &group.grad_norm_bias};
      if (i % 3 == 0 || norm)
        write_block_sums(sums + places[i / 3].sums, group.last - group.first, width, i % 3 * N,
                         *vectors[i % 3]);
    }
    stream_fence();
    local.release_if_large();
  }
  plan.release_if_large();
  sums_memory.release_if_large();
  grad_memory.release_if_large();
  low_rank_memory.release_if_large();
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace snk::cpu::SNK_ISA
