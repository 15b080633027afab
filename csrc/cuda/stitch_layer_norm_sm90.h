// y = x Wᵀ + b and LN(y) as one kernel for Hopper (sm_90a), where each of up to GROUPS groups of
// rows may have a W and a norm of its own. A low-rank part is merged into W before (merge.cu).
//
// A cluster of CTAs shares bands of 64 rows of one group: each CTA computes all of these rows for
// one slice of the columns. Its slice of W stays in shared memory from the first band of a group to
// the last, so that per band only x is fetched. In a CTA,
//   - the first warpgroup, the producer, lets the copy engine fetch W's slice, and fill a ring of
//     stages with x, 128 columns of a band each. x is the same for the whole cluster: one CTA, another
//     in each step, fetches it once for all (multicast), as soon as all have told it that their stage
//     is free. One warp tells, and another one fetches, so that neither waits for the other. At the
//     end of a group x reaches into the next group's rows; they are multiplied, and not stored.
//   - the other warpgroups, the consumers, take bands in turn: while one multiplies, the others
//     normalise and store. What the tensor cores do and what memory does so overlap.
//
// The epilogue adds the bias, rounds y, and takes mean and M2 = Σ (y − mean)² of the slice's
// columns in two passes over registers. Every CTA sends these to all CTAs of the cluster, stores y
// meanwhile, and merges all slices in the same order, M2 = Σ M2ᵢ + nᵢ (meanᵢ − mean)² (Chan et al.
// 1979), to store LN(y).
#pragma once

#include "cuda/number.h"
#include "cuda/sm90.h"
#include "cuda/sm90_layout.h"
#include "cuda/sm90_wgmma.h"

namespace snk::cuda::sm90 {

// An epilogue takes about twice as long as a product, so that two of them are under way.
constexpr int WARPGROUP = 128, CONSUMERS = 3, THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int BAND = 64, WARPS = 4;  // of a consumer
constexpr int TURNS = CONSUMERS;     // behind the barriers of single consumers, those of their turns

// A thread of the launch has 65536 / 512 registers. The producer needs few; the consumers'
// accumulators, which become y, take up to 64.
constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 160;
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * 128);

struct Group {
  CUtensorMap weight;
  Vector bias, norm_weight, norm_bias;
};

// By value, tensor maps included: a captured graph holds a copy of its own, and nothing but the
// offsets is looked up in device memory.
template <int GROUPS>
struct Arguments {
  CUtensorMap x;
  Group group[GROUPS];
  // Group i has rows offsets[i] up to offsets[i + 1], if these are in device memory; if they are not,
  // known[i] up to known[i + 1]. Where GROUPS is 1, all rows.
  const int64_t* offsets;
  int known[GROUPS + 1];
  int groups;
  void *y, *normed;
  float *mean, *rstd;
  int rows, cols, steps, stages, slices;  // steps of STEP along K
  float eps, per_column;                  // 1 / cols
};

// Lanes of a warp, by which a band is found.
constexpr int MAX_GROUPS = 32;

// Some adjacent rows of one group: from `row` up to `stop`, of which a consumer takes BAND.
struct Band {
  int group, row, stop;
};

// All bands of all groups, counted from 0. Whole warps make one and ask it: each lane knows those of
// a group. Offsets that make no sense stay within the rows.
template <int GROUPS>
class Bands {
 public:
  static_assert(GROUPS <= MAX_GROUPS);
  __device__ explicit Bands(const Arguments<GROUPS>& p) : stop_(p.rows), end_(in(p.rows)) {
    if constexpr (GROUPS > 1) {
      const int lane = threadIdx.x % 32;
      const auto offset = [&](int i) {
        const int64_t row = p.offsets == nullptr ? p.known[i] : p.offsets[i];
        return int(row < 0 ? 0 : row > p.rows ? p.rows : row);
      };
      stop_ = 0;
      if (lane < p.groups) {
        start_ = offset(lane);
        stop_ = offset(lane + 1);
      }
      end_ = in(stop_ - start_);
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int before = __shfl_up_sync(~0u, end_, distance);
        if (lane >= distance) end_ += before;
      }
    }
  }
  __device__ int count() const { return GROUPS > 1 ? __shfl_sync(~0u, end_, 31) : end_; }
  __device__ Band at(int index) const {
    if constexpr (GROUPS == 1) return {0, index * BAND, stop_};
    const int group = __ffs(int(__ballot_sync(~0u, index < end_))) - 1;
    const int first = __shfl_sync(~0u, end_ - in(stop_ - start_), group);
    return {group, __shfl_sync(~0u, start_, group) + (index - first) * BAND,
            __shfl_sync(~0u, stop_, group)};
  }

 private:
  __device__ static int in(int rows) { return rows > 0 ? (rows - 1) / BAND + 1 : 0; }
  int start_ = 0, stop_, end_;  // rows of this lane's group; bands up to its end
};

// The shared memory of a CTA: W's slice, the ring, and the rest.
template <int WIDTH, int GROUPS>
struct Shared {
  // Of a tile, as which the copy engine knows them, and of the tiles of a step.
  static constexpr int WEIGHT_TILE = WIDTH * TILE_ROW_BYTES, X_TILE = BAND * TILE_ROW_BYTES;
  static constexpr int WEIGHT_BYTES = TILES * WEIGHT_TILE, X_BYTES = TILES * X_TILE;
  static_assert(WEIGHT_TILE % TILE_ALIGNMENT == 0 && X_TILE % TILE_ALIGNMENT == 0);

  struct Rest {
    uint64_t full[MAX_STAGES], empty[MAX_STAGES];
    uint64_t free_everywhere[MAX_STAGES];  // of the steps that this CTA fetches, in turn
    uint64_t weight_full[MAX_STEPS], weight_empty;
    uint64_t statistics_full[CONSUMERS][2][WARPS];
    // Of the group whose bands a consumer is at.
    struct {
      alignas(16) float bias[WIDTH], norm_weight[WIDTH], norm_bias[WIDTH];
    } vectors[GROUPS > 1 ? CONSUMERS : 1];
    // Mean and M2 by consumer, set, slice and row, as many as there are slices. Two sets: a CTA may
    // send those of its next band before a slower one has read these.
    float2 statistics[1];
  };

  uint32_t base, ring;
  Rest* rest;

  __device__ Shared(unsigned char* memory, int steps, int stages)
      : base(shared_address(memory)),
        ring(base + steps * WEIGHT_BYTES),
        rest(reinterpret_cast<Rest*>(memory + steps * WEIGHT_BYTES + stages * X_BYTES)) {}

  static constexpr int bytes(int steps, int stages, int slices) {
    return steps * WEIGHT_BYTES + stages * X_BYTES + int(sizeof(Rest)) +
           CONSUMERS * 2 * slices * BAND * int(sizeof(float2));
  }

  __device__ uint32_t weight(int step, int tile) const {
    return base + step * WEIGHT_BYTES + tile * WEIGHT_TILE;
  }
  __device__ uint32_t x(int stage, int tile) const {
    return ring + stage * X_BYTES + tile * X_TILE;
  }
  __device__ uint32_t free_everywhere(int i) const {
    return shared_address(&rest->free_everywhere[i]);
  }
  __device__ uint32_t full(int stage) const { return shared_address(&rest->full[stage]); }
  __device__ uint32_t empty(int stage) const { return shared_address(&rest->empty[stage]); }
  __device__ uint32_t weight_full(int step) const {
    return shared_address(&rest->weight_full[step]);
  }
  __device__ uint32_t weight_empty() const { return shared_address(&rest->weight_empty); }
  __device__ auto& vectors(int consumer) const { return rest->vectors[GROUPS > 1 ? consumer : 0]; }
  __device__ float2* statistics(int consumer, int set, int slices, int slice) const {
    return rest->statistics + ((consumer * 2 + set) * slices + slice) * BAND;
  }
};

// Where the producer is: in the ring, and in the sequence of all steps of all bands, of which CTA
// `fetcher` fetches this one as its own `turn`.
struct Sequence {
  Ring stage, turn{MAX_STAGES};
  int fetcher = 0, slices;
  __device__ Sequence(int stages, int slices) : stage(stages), slices(slices) {}
  __device__ void advance() {
    stage.advance();
    if (++fetcher == slices) {
      fetcher = 0;
      turn.advance();
    }
  }
};

// For each step of a band, tells who fetches x that a stage is free here. If `fresh`, W's slice is
// fetched along the way. By one thread.
template <int GROUPS, int WIDTH>
__device__ void announce(const Arguments<GROUPS>& p, const Shared<WIDTH, GROUPS>& shared, int slice,
                         const Band& band, bool fresh, Sequence& at) {
  using S = Shared<WIDTH, GROUPS>;
  for (int step = 0; step < p.steps; ++step, at.advance()) {
    if (fresh) {
      arrive_expecting(shared.weight_full(step), S::WEIGHT_BYTES);
      for (int tile = 0; tile < TILES; ++tile)
        load_tile(shared.weight(step, tile), &p.group[band.group].weight,
                  step * STEP + tile * TILE_K, slice * WIDTH, shared.weight_full(step));
    }
    wait(shared.empty(at.stage.stage), at.stage.phase ^ 1);
    arrive_expecting(shared.full(at.stage.stage), S::X_BYTES);
    arrive_remote(shared.free_everywhere(at.turn.stage), uint32_t(at.fetcher));
  }
}

// Fetches x for all, in those steps of a band that are this CTA's. By one thread.
template <int GROUPS, int WIDTH>
__device__ void fetch(const Arguments<GROUPS>& p, const Shared<WIDTH, GROUPS>& shared, int slice,
                      const Band& band, Sequence& at) {
  const uint16_t everyone = uint16_t((1 << p.slices) - 1);
  for (int step = 0; step < p.steps; ++step, at.advance()) {
    if (at.fetcher != slice) continue;
    wait(shared.free_everywhere(at.turn.stage), at.turn.phase);
    for (int tile = 0; tile < TILES; ++tile) {
      const int column = step * STEP + tile * TILE_K;
      load_tile(shared.x(at.stage.stage, tile), &p.x, column, band.row,
                shared.full(at.stage.stage), everyone);
      // The ring may be shorter than the way from device memory.
      prefetch_tile(&p.x, column, band.row + BAND);
    }
  }
}

// The vectors of a group in place of the last one's, by all threads that read them.
template <int GROUPS, int WIDTH>
__device__ void take_vectors(const Group& group, const Shared<WIDTH, GROUPS>& shared, int consumer,
                             int first, int cols) {
  constexpr int READERS = WARPGROUP * (GROUPS > 1 ? 1 : CONSUMERS);
  const int id = GROUPS > 1 ? consumer : 0;
  auto& vectors = shared.vectors(consumer);
  consumer_sync<READERS>(id);
  for (int i = (threadIdx.x - WARPGROUP) % READERS; i < WIDTH; i += READERS) {
    const int column = first + i;
    const bool inside = column < cols;
    vectors.bias[i] = inside ? group.bias.at(column, 0) : 0;
    vectors.norm_weight[i] = inside ? group.norm_weight.at(column, 1) : 0;
    vectors.norm_bias[i] = inside ? group.norm_bias.at(column, 0) : 0;
  }
  consumer_sync<READERS>(id);
}

// acc = x Wᵀ for the rows of a band. `parity` is that of W's barriers; `pass_on` is called once all
// products are under way.
template <typename T, int GROUPS, int WIDTH, typename PassOn>
__device__ void multiply(const Arguments<GROUPS>& p, const Shared<WIDTH, GROUPS>& shared,
                         uint32_t parity, Ring& at, float (&acc)[WIDTH / 2],
                         const PassOn& pass_on) {
  const auto release = [&](int stage) {
    if (threadIdx.x % 32 == 0) arrive(shared.empty(stage));
  };
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) acc[i] = 0;
  wgmma_settle(acc);
  int before = -1;
  for (int step = 0; step < p.steps; ++step, at.advance()) {
    wait(shared.weight_full(step), parity);
    wait(shared.full(at.stage), at.phase);
    wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int k = 0; k < TILE_K / 16; ++k)
        wgmma<T>(acc, tile_descriptor(shared.x(at.stage, tile) + 32 * k),
                 tile_descriptor(shared.weight(step, tile) + 32 * k));
    wgmma_commit();
    // The products of the step before are over once those of this one are all that is under way.
    wgmma_wait<1>();
    if (before >= 0) release(before);
    before = at.stage;
  }
  pass_on();
  wgmma_wait<0>();
  wgmma_settle(acc);
  release(before);
}

// The words of four neighbouring lanes as a 4 × 4 matrix, transposed: from two columns out of every
// eight to eight adjacent columns, which a lane stores in one piece.
__device__ inline void transpose(uint32_t (&word)[4], uint32_t lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t& first = word[distance == 1 ? 2 * i : i];
      uint32_t& second = word[distance == 1 ? 2 * i + 1 : i + 2];
      const uint32_t received = __shfl_xor_sync(~0u, upper ? first : second, distance);
      (upper ? first : second) = received;
    }
  }
}

// y and LN(y) of the warp's 16 rows of a band, and their statistics; `turn` counts this consumer's
// bands. A lane has two rows, `half` of them each, and in each group of eight columns two.
//
// Long sums are four sums side by side, as an addition takes as long as four that do not wait for
// each other.
template <typename T, int GROUPS, int WIDTH>
__device__ void finish(const Arguments<GROUPS>& p, const Shared<WIDTH, GROUPS>& shared, int slice,
                       int consumer, int turn, const Band& band, float (&y)[WIDTH / 2]) {
  constexpr int N = WIDTH / 8;
  const auto& vectors = shared.vectors(consumer);
  const uint32_t lane = threadIdx.x % 32, quad = lane / 4, member = lane % 4;
  const int warp = threadIdx.x / 32 % WARPS;
  const auto columns = [&](int s) { return float(min(WIDTH, p.cols - s * WIDTH)); };
  const int groups = min(N, (p.cols - slice * WIDTH) / 8);  // that are not beyond the last column
  const auto of_four = [](float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  };
  const auto pair = [&](const float (&vector)[WIDTH], int n) {
    return *reinterpret_cast<const float2*>(&vector[8 * n + 2 * member]);
  };

  float sums[2][4] = {};
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float2 bias = pair(vectors.bias, n);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& first = y[4 * n + 2 * half];
      float& second = y[4 * n + 2 * half + 1];
      const float2 rounded = unpack<T>(pack<T>(first + bias.x, second + bias.y));
      first = rounded.x, second = rounded.y;
      sums[half][n % 4] += first + second;  // zeros beyond the last column
    }
  }
  float2 of_slice[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float (&sum)[4] = sums[half];
    const float total = of_four((sum[0] + sum[1]) + (sum[2] + sum[3]));
    of_slice[half].x = __fdividef(total, columns(slice));
  }
  float squares[2][4] = {};
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (n >= groups) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float a = y[4 * n + 2 * half] - of_slice[half].x;
      const float b = y[4 * n + 2 * half + 1] - of_slice[half].x;
      squares[half][n % 4] += a * a + b * b;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float (&sum)[4] = squares[half];
    of_slice[half].y = of_four((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  // The statistics go to all other CTAs, a warp's in one piece to each. Those which lie there are of
  // the turn before the last, and no longer needed: that CTA released one of the last 3 · steps
  // stages, so it is not further behind than two bands, and as bands are begun in turn, this consumer
  // has begun its last one there.
  const int set = turn % 2, in_band = warp * 16 + int(quad);
  const uint32_t statistics_full =
      shared_address(&shared.rest->statistics_full[consumer][set][warp]);
  float2* const own = shared.statistics(consumer, set, p.slices, slice);
  if (member == 0) {
    own[in_band] = of_slice[0];
    own[in_band + 8] = of_slice[1];
  }
  constexpr uint32_t PIECE = 16 * sizeof(float2);
  if (lane == 0) arrive_expecting(statistics_full, (p.slices - 1) * PIECE);
  fence_before_copies();
  __syncwarp();
  if (lane < uint32_t(p.slices) && lane != uint32_t(slice))
    send(shared_address(own + warp * 16), lane, PIECE, statistics_full);

  // A lane stores the group of its number out of every four.
  const int rows[2] = {band.row + in_band, band.row + in_band + 8};
  const auto store = [&](void* matrix, int half, int n, uint32_t (&word)[4]) {
    const int group = n + int(member);
    T* const to = static_cast<T*>(matrix) + int64_t(rows[half]) * p.cols + slice * WIDTH + group * 8;
    transpose(word, lane);
    if (rows[half] < band.stop && group < groups) store_16_bytes(to, word);
  };
#pragma unroll
  for (int n = 0; n < N; n += 4)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        word[i] = pack<T>(y[4 * (n + i) + 2 * half], y[4 * (n + i) + 2 * half + 1]);
      store(p.y, half, n, word);
    }

  // Every lane of a row takes every fourth slice: all CTAs add up in the same order.
  wait(statistics_full, turn / 2 % 2);
  constexpr int OWN = MAX_SLICES / 4;
  float mean[2], rstd[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float2 part[OWN];
    float count[OWN], centre = 0, square = 0;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int s = int(member) + 4 * i;
      const bool is = s < p.slices;
      part[i] = is ? shared.statistics(consumer, set, p.slices, s)[in_band + 8 * half] : float2{};
      count[i] = is ? columns(s) : 0;
      centre += count[i] * part[i].x;
    }
    mean[half] = of_four(centre) * p.per_column;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const float off = part[i].x - mean[half];
      square += part[i].y + count[i] * off * off;
    }
    rstd[half] = rsqrtf(of_four(square) * p.per_column + p.eps);
    if (slice == 0 && member == 0 && rows[half] < band.stop) {
      p.mean[rows[half]] = mean[half];
      p.rstd[rows[half]] = rstd[half];
    }
  }

#pragma unroll
  for (int n = 0; n < N; n += 4) {
    uint32_t word[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 weight = pair(vectors.norm_weight, n + i), bias = pair(vectors.norm_bias, n + i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float first = y[4 * (n + i) + 2 * half], second = y[4 * (n + i) + 2 * half + 1];
        word[half][i] = pack<T>((first - mean[half]) * rstd[half] * weight.x + bias.x,
                                (second - mean[half]) * rstd[half] * weight.y + bias.y);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) store(p.normed, half, n, word[half]);
  }
}

template <typename T, int WIDTH, int GROUPS>
__global__ void __launch_bounds__(THREADS, 1)
    stitch_layer_norm_sm90_kernel(const __grid_constant__ Arguments<GROUPS> p) {
  using S = Shared<WIDTH, GROUPS>;
  const S shared(shared_memory(), p.steps, p.stages);
  const int slice = int(cluster_rank());

  if (threadIdx.x < p.groups) prefetch(&p.group[threadIdx.x].weight);
  if (threadIdx.x == 0) {
    prefetch(&p.x);
    for (int stage = 0; stage < p.stages; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), WARPS);
    }
    for (int turn = 0; turn < MAX_STAGES; ++turn)
      barrier_init(shared.free_everywhere(turn), p.slices);
    for (int step = 0; step < p.steps; ++step) barrier_init(shared.weight_full(step), 1);
    barrier_init(shared.weight_empty(), CONSUMERS * WARPS);
    for (auto& consumer : shared.rest->statistics_full)
      for (auto& set : consumer)
        for (uint64_t& barrier : set) barrier_init(shared_address(&barrier), 1);
    fence_barrier_init();
  }
  // No CTA sends anything to one that has not begun.
  cluster_sync();
  wait_for_kernel_before();

  // Adjacent bands, so that a cluster changes groups as seldom as can be.
  const int clusters = gridDim.x / p.slices, cluster = blockIdx.x / p.slices;
  const Bands<GROUPS> bands(p);
  const int64_t count = bands.count();
  const int first = int(count * cluster / clusters), last = int(count * (cluster + 1) / clusters);
  int group = -1;
  uint32_t parity = 1;  // of the barriers of the group's W
  if (threadIdx.x < WARPGROUP) {
    give_registers_back<PRODUCER_REGISTERS>();
    Sequence at(p.stages, p.slices);
    if (threadIdx.x < 64)
      for (int index = first; index < last; ++index) {
        const Band band = bands.at(index);
        const bool fresh = band.group != group;
        if (fresh) parity ^= 1;
        if (threadIdx.x == 0) {
          if (fresh) wait(shared.weight_empty(), parity ^ 1);
          announce(p, shared, slice, band, fresh, at);
        } else if (threadIdx.x == 32) {
          fetch(p, shared, slice, band, at);
        }
        group = band.group;
      }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    Ring at(p.stages);
    const int consumer = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0) - 1;
    int turn = 0;
    for (int index = first; index < last; ++index) {
      const Band band = bands.at(index);
      if (band.group != group) {
        // The one before is done with, also by a consumer that had no band of it; and nobody goes
        // on by two groups while others are at the first.
        if (group >= 0 && threadIdx.x % 32 == 0) arrive(shared.weight_empty());
        parity ^= 1;
        wait(shared.weight_full(0), parity);
        group = band.group;
        take_vectors(p.group[group], shared, consumer, slice * WIDTH, p.cols);
      }
      if ((index - first) % CONSUMERS != consumer) {
        at.skip(p.steps);
        continue;
      }
      // Strictly in turn: who waits for a phase of a barrier must have seen the end of the last one,
      // or know somebody who has.
      if (index > first) consumer_sync<2 * WARPGROUP>(TURNS + consumer);
      float acc[WIDTH / 2];
      multiply<T>(p, shared, parity, at, acc, [&] {
        if (index + 1 < last) consumer_arrive<2 * WARPGROUP>(TURNS + (consumer + 1) % CONSUMERS);
      });
      finish<T>(p, shared, slice, consumer, turn++, band, acc);
    }
  }
  // No CTA ends while another may still send to it.
  cluster_sync();
}

}  // namespace snk::cuda::sm90
