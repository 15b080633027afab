// y = x Wᵀ + b + s (x Aᵀ) Bᵀ and LN(y) as one kernel for Hopper (sm_90a), where each of up to GROUPS
// groups of rows may have a stitch and a norm of its own. It has never run on a GPU, only on the
// stand-in machine of python_tests/kernels/hopper.
//
// A cluster of CTAs shares a band of up to 128 rows of one group: each CTA computes all of these
// rows for one slice of the columns, and the cluster takes band after band. In a CTA,
//   - one warp of the first warpgroup, the producer, lets the copy engine fill a ring of stages,
//     each a step of 64 along K: the x tile, W's slice, A. x and A are the same for the whole
//     cluster: one CTA, another in each step, fetches them once for all (multicast). At the end of
//     a group the x tile reaches into the next group's rows; they are multiplied, and not stored.
//   - the other two warpgroups, the consumers, multiply 64 rows each: acc += x Wᵀ and low += x Aᵀ.
// The low-rank part is one more step of the same accumulator, against B. s · low is never rounded
// to half: it is split into a sum of two halves, and both are multiplied. As an accumulator's
// fragment is an operand's fragment, it does not leave the registers for that.
//
// The epilogue adds the bias, rounds y, and takes mean and M2 = Σ (y − mean)² of the slice's
// columns in two passes over registers. Every CTA sends these to all CTAs of the cluster, stores y
// meanwhile, and merges all slices in the same order, M2 = Σ M2ᵢ + nᵢ (meanᵢ − mean)² (Chan et al.
// 1979), to store LN(y). All the while the producer loads the next band.
#pragma once

#include "cuda/number.h"
#include "cuda/sm90.h"
#include "cuda/sm90_layout.h"
#include "cuda/sm90_wgmma.h"

namespace snk::cuda::sm90 {

constexpr int WARPGROUP = 128, CONSUMERS = 2, THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int BAND = 64 * CONSUMERS, CONSUMER_WARPS = 4 * CONSUMERS;

// A thread of the launch has 65536 / 384 registers, rounded down to 168. The producer needs few;
// the consumers' accumulators alone take up to 160.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * 168);

struct Group {
  CUtensorMap weight, lora_A, lora_B;
  Vector bias, norm_weight, norm_bias;
  float scaling;
  // Added to the rows of A and B that are loaded. 0; or, for a group without a low-rank part beside
  // others that have one, as many as both maps have: beyond these, all that is loaded is zero.
  int low_rank_row;
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
  int rows, cols, k_steps, slices;
  float eps, per_column;  // 1 / cols
};

// Lanes of a warp, by which a band is found.
constexpr int MAX_GROUPS = 32;

// Some adjacent rows of one group: from `row` up to `stop`, of which a cluster takes BAND.
struct Band {
  int group, row, stop;
};

// The band of this index, counted over all groups; false after the last. A whole warp calls: each
// lane counts the bands of a group. Offsets that make no sense stay within the rows.
template <int GROUPS>
__device__ bool find(const Arguments<GROUPS>& p, int index, Band& band) {
  static_assert(GROUPS <= MAX_GROUPS);
  if constexpr (GROUPS == 1) {
    if (index > (p.rows - 1) / BAND) return false;
    band = {0, index * BAND, p.rows};
    return true;
  } else {
    const int lane = threadIdx.x % 32;
    const auto offset = [&](int i) {
      const int64_t row = p.offsets == nullptr ? p.known[i] : p.offsets[i];
      return int(row < 0 ? 0 : row > p.rows ? p.rows : row);
    };
    int start = 0, stop = 0;
    if (lane < p.groups) {
      start = offset(lane);
      stop = offset(lane + 1);
    }
    const int bands = start < stop ? (stop - start - 1) / BAND + 1 : 0;
    int end = bands;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(~0u, end, distance);
      if (lane >= distance) end += before;
    }
    const unsigned beyond = __ballot_sync(~0u, index < end);
    if (beyond == 0) return false;
    const int group = __ffs(int(beyond)) - 1;
    const int first = __shfl_sync(~0u, end - bands, group);
    band = {group, __shfl_sync(~0u, start, group) + (index - first) * BAND,
            __shfl_sync(~0u, stop, group)};
    return true;
  }
}

// Shared memory of a CTA. RANK is the rank of the low-rank part, padded to a multiple of 16; 0 for
// none.
template <int WIDTH, int RANK>
struct Shared {
  static constexpr int X_BYTES = BAND * TILE_ROW_BYTES, WEIGHT_BYTES = WIDTH * TILE_ROW_BYTES,
                       A_BYTES = RANK * TILE_ROW_BYTES,
                       STAGE_BYTES = X_BYTES + WEIGHT_BYTES + A_BYTES;
  static_assert(X_BYTES % TILE_ALIGNMENT == 0 && WEIGHT_BYTES % TILE_ALIGNMENT == 0 &&
                A_BYTES % TILE_ALIGNMENT == 0);

  // What is not the ring. Two sets of statistics, and of their barriers: a CTA may send those of
  // its next band before a slower one has read these. The vectors are those of the band's group.
  struct Rest {
    float2 statistics[2][MAX_SLICES][BAND];  // mean and M2, by slice and row
    float bias[WIDTH], norm_weight[WIDTH], norm_bias[WIDTH];
    uint64_t statistics_full[2][CONSUMER_WARPS];
    uint64_t full[4], empty[4];
  };

  static constexpr int LIMIT = 227 * 1024;
  static constexpr int FITTING = (LIMIT - int(sizeof(Rest))) / STAGE_BYTES;
  static constexpr int STAGES = FITTING < 4 ? FITTING : 4;
  static_assert(STAGES >= 3);
  static constexpr int BYTES = STAGES * STAGE_BYTES + int(sizeof(Rest));
  using Position = Ring<STAGES>;

  uint32_t base;
  Rest* rest;

  __device__ explicit Shared(unsigned char* memory)
      : base(shared_address(memory)), rest(reinterpret_cast<Rest*>(memory + STAGES * STAGE_BYTES)) {}

  __device__ uint32_t x(int stage) const { return base + stage * STAGE_BYTES; }
  __device__ uint32_t weight(int stage) const { return x(stage) + X_BYTES; }
  __device__ uint32_t lora_A(int stage) const { return weight(stage) + WEIGHT_BYTES; }
  // B's slice has the shape of a W tile, and comes in the place of one.
  __device__ uint32_t lora_B(int stage) const { return weight(stage); }
  __device__ uint32_t full(int stage) const { return shared_address(&rest->full[stage]); }
  __device__ uint32_t empty(int stage) const { return shared_address(&rest->empty[stage]); }
};

// The loads of one band, by one thread. A stage may be overwritten once the consumers of all CTAs
// have released it, as x and A go to all of them.
template <int GROUPS, int WIDTH, int RANK>
__device__ void load(const Arguments<GROUPS>& p, const Shared<WIDTH, RANK>& shared, int slice,
                     const Band& band, typename Shared<WIDTH, RANK>::Position& at) {
  using S = Shared<WIDTH, RANK>;
  const uint16_t everyone = uint16_t((1 << p.slices) - 1);
  const int column = slice * WIDTH;
  const Group& group = p.group[band.group];
  for (int step = 0; step < p.k_steps; ++step, at.advance()) {
    const uint32_t full = shared.full(at.stage);
    wait(shared.empty(at.stage), at.phase ^ 1);
    arrive_expecting(full, S::STAGE_BYTES);
    if (step % p.slices == slice)
      load_tile(shared.x(at.stage), &p.x, step * TILE_K, band.row, full, everyone);
    load_tile(shared.weight(at.stage), &group.weight, step * TILE_K, column, full);
    if (RANK > 0 && (step + 1) % p.slices == slice)
      load_tile(shared.lora_A(at.stage), &group.lora_A, step * TILE_K, group.low_rank_row, full,
                everyone);
  }
  if (RANK > 0) {
    const uint32_t full = shared.full(at.stage);
    wait(shared.empty(at.stage), at.phase ^ 1);
    arrive_expecting(full, S::WEIGHT_BYTES);
    load_tile(shared.lora_B(at.stage), &group.lora_B, 0, group.low_rank_row + column, full);
    at.advance();
  }
}

// The vectors of a group in place of the last one's, by all consumers.
template <int WIDTH, int RANK>
__device__ void take_vectors(const Group& group, const Shared<WIDTH, RANK>& shared, int first,
                             int cols) {
  consumer_sync<CONSUMERS * WARPGROUP>();
  for (int i = threadIdx.x - WARPGROUP; i < WIDTH; i += CONSUMERS * WARPGROUP) {
    const int column = first + i;
    const bool inside = column < cols;
    shared.rest->bias[i] = inside ? group.bias.at(column, 0) : 0;
    shared.rest->norm_weight[i] = inside ? group.norm_weight.at(column, 1) : 0;
    shared.rest->norm_bias[i] = inside ? group.norm_bias.at(column, 0) : 0;
  }
  consumer_sync<CONSUMERS * WARPGROUP>();
}

// s · low as operands of the next product, 16 columns each: value = high + rest, both of type T. (A
// float16 holds up to 65504; beyond, the row becomes NaN or infinite, as it does in eager float16.)
template <typename T, int RANK>
__device__ void split(const float (&low)[RANK / 2], float scaling, uint32_t (&high)[RANK / 16][4],
                      uint32_t (&rest)[RANK / 16][4]) {
#pragma unroll
  for (int i = 0; i < RANK / 4; ++i) {
    const float first = scaling * low[2 * i], second = scaling * low[2 * i + 1];
    const uint32_t word = pack<T>(first, second);
    const float2 rounded = unpack<T>(word);
    high[i / 4][i % 4] = word;
    rest[i / 4][i % 4] = pack<T>(first - rounded.x, second - rounded.y);
  }
}

// acc = x Wᵀ + s (x Aᵀ) Bᵀ for the 64 rows of this warpgroup.
template <typename T, int WIDTH, int RANK>
__device__ void multiply(int k_steps, int slices, float scaling, const Shared<WIDTH, RANK>& shared,
                         int warpgroup, typename Shared<WIDTH, RANK>::Position& at,
                         float (&acc)[WIDTH / 2]) {
  const uint32_t lane = threadIdx.x % 32;
  // Every warp tells every CTA, by a lane each.
  const auto release = [&](int stage) {
    if (lane < uint32_t(slices)) arrive_remote(shared.empty(stage), lane);
  };
  constexpr int LOW = RANK > 0 ? RANK / 2 : 1;
  float low[LOW];
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) acc[i] = 0;
#pragma unroll
  for (int i = 0; i < LOW; ++i) low[i] = 0;

  for (int step = 0; step < k_steps; ++step, at.advance()) {
    wait(shared.full(at.stage), at.phase);
    wgmma_fence();
    const uint32_t x = shared.x(at.stage) + warpgroup * 64 * TILE_ROW_BYTES;
#pragma unroll
    for (int k = 0; k < TILE_K / 16; ++k) {
      wgmma<T>(acc, tile_descriptor(x + 32 * k),
               tile_descriptor(shared.weight(at.stage) + 32 * k));
      if constexpr (RANK > 0)
        wgmma<T>(low, tile_descriptor(x + 32 * k),
                 tile_descriptor(shared.lora_A(at.stage) + 32 * k));
    }
    // The stage goes back at once: while one warpgroup waits here, the other one's products run.
    wgmma_finish();
    wgmma_settle(acc);
    wgmma_settle(low);
    release(at.stage);
  }

  if constexpr (RANK > 0) {
    uint32_t high[RANK / 16][4], rest[RANK / 16][4];
    split<T, RANK>(low, scaling, high, rest);
    wgmma_settle(high);
    wgmma_settle(rest);
    wait(shared.full(at.stage), at.phase);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < RANK / 16; ++k) {
      const uint64_t b = tile_descriptor(shared.lora_B(at.stage) + 32 * k);
      wgmma<T>(acc, high[k], b);
      wgmma<T>(acc, rest[k], b);
    }
    wgmma_finish();
    wgmma_settle(acc);
    release(at.stage);
    at.advance();
  }
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

// y and LN(y) of the warp's 16 rows of a band, and their statistics; `turn` counts this cluster's
// bands.
template <typename T, int GROUPS, int WIDTH, int RANK>
__device__ void finish(const Arguments<GROUPS>& p, const Shared<WIDTH, RANK>& shared, int slice,
                       int turn, const Band& band, const float (&acc)[WIDTH / 2]) {
  constexpr int CHUNKS = WIDTH / 32;
  const auto& rest = *shared.rest;
  const uint32_t lane = threadIdx.x % 32, quad = lane / 4, member = lane % 4;
  const int warp = threadIdx.x / 32 - 4;
  const int set = turn % 2;
  const auto columns = [&](int s) { return float(min(WIDTH, p.cols - s * WIDTH)); };
  // This lane's columns: 32 g + 8 member … + 7 of the slice, for all g; its rows: two.
  const auto has = [&](int g) { return slice * WIDTH + g * 32 + int(member) * 8 < p.cols; };
  const auto sum_of_four = [](float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  };
  uint32_t y[2][CHUNKS][4];
#pragma unroll
  for (int g = 0; g < CHUNKS; ++g) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = 4 * g + j;
      const float2 bias = *reinterpret_cast<const float2*>(&rest.bias[8 * n + 2 * member]);
      y[0][g][j] = pack<T>(acc[4 * n] + bias.x, acc[4 * n + 1] + bias.y);
      y[1][g][j] = pack<T>(acc[4 * n + 2] + bias.x, acc[4 * n + 3] + bias.y);
    }
    transpose(y[0][g], lane);
    transpose(y[1][g], lane);
  }

  const uint32_t statistics_full = shared_address(&rest.statistics_full[set][warp]);
  float2 of_slice[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = 0, squares = 0;
#pragma unroll
    for (int g = 0; g < CHUNKS; ++g)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 value = unpack<T>(y[half][g][j]);
        if (has(g)) total += value.x + value.y;
      }
    const float mean = __fdividef(sum_of_four(total), columns(slice));
#pragma unroll
    for (int g = 0; g < CHUNKS; ++g)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 value = unpack<T>(y[half][g][j]);
        const float a = value.x - mean, b = value.y - mean;
        if (has(g)) squares += a * a + b * b;
      }
    of_slice[half] = {mean, sum_of_four(squares)};
  }
  // The four lanes of a row all know its statistics: each sends them to every fourth CTA.
  const int in_band = warp * 16 + int(quad);
  if (lane == 0) arrive_expecting(statistics_full, 16 * p.slices * sizeof(float2));
  for (uint32_t peer = member; peer < uint32_t(p.slices); peer += 4)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      send(shared_address(&rest.statistics[set][slice][in_band + 8 * half]), peer, of_slice[half],
           statistics_full);

  const int rows[2] = {band.row + in_band, band.row + in_band + 8};
  const auto start = [&](void* matrix, int half) {
    return static_cast<T*>(matrix) + int64_t(rows[half]) * p.cols + slice * WIDTH + member * 8;
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* const to = start(p.y, half);
#pragma unroll
    for (int g = 0; g < CHUNKS; ++g)
      if (rows[half] < band.stop && has(g)) store_16_bytes(to + g * 32, y[half][g]);
  }

  wait(statistics_full, turn / 2 % 2);
  float mean[2], rstd[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float centre = 0, squares = 0;
#pragma unroll 1
    for (int s = 0; s < p.slices; ++s)
      centre += columns(s) * rest.statistics[set][s][in_band + 8 * half].x;
    centre *= p.per_column;
#pragma unroll 1
    for (int s = 0; s < p.slices; ++s) {
      const float2 part = rest.statistics[set][s][in_band + 8 * half];
      squares += part.y + columns(s) * (part.x - centre) * (part.x - centre);
    }
    mean[half] = centre;
    rstd[half] = rsqrtf(squares * p.per_column + p.eps);
    if (slice == 0 && member == 0 && rows[half] < band.stop) {
      p.mean[rows[half]] = mean[half];
      p.rstd[rows[half]] = rstd[half];
    }
  }

  T* const normed[2] = {start(p.normed, 0), start(p.normed, 1)};
#pragma unroll
  for (int g = 0; g < CHUNKS; ++g) {
    float weight[8], bias[8];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const int column = g * 32 + int(member) * 8 + i;
      *reinterpret_cast<float4*>(weight + i) =
          *reinterpret_cast<const float4*>(&rest.norm_weight[column]);
      *reinterpret_cast<float4*>(bias + i) =
          *reinterpret_cast<const float4*>(&rest.norm_bias[column]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 value = unpack<T>(y[half][g][j]);
        word[j] = pack<T>((value.x - mean[half]) * rstd[half] * weight[2 * j] + bias[2 * j],
                          (value.y - mean[half]) * rstd[half] * weight[2 * j + 1] + bias[2 * j + 1]);
      }
      if (rows[half] < band.stop && has(g)) store_16_bytes(normed[half] + g * 32, word);
    }
  }
}

template <typename T, int WIDTH, int RANK, int GROUPS>
__global__ void __launch_bounds__(THREADS, 1)
    stitch_layer_norm_sm90_kernel(const __grid_constant__ Arguments<GROUPS> p) {
  using S = Shared<WIDTH, RANK>;
  const S shared(shared_memory());
  const int slice = int(cluster_rank());

  if (threadIdx.x < p.groups) prefetch(&p.group[threadIdx.x].weight);
  if (threadIdx.x == 0) {
    prefetch(&p.x);
    for (int stage = 0; stage < S::STAGES; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), p.slices * CONSUMER_WARPS);
    }
    for (auto& set : shared.rest->statistics_full)
      for (uint64_t& barrier : set) barrier_init(shared_address(&barrier), 1);
    fence_barrier_init();
  }
  // No CTA sends anything to one that has not begun.
  cluster_sync();

  const int clusters = gridDim.x / p.slices;
  int index = blockIdx.x / p.slices;
  Band band;
  typename S::Position at;
  if (threadIdx.x < WARPGROUP) {
    give_registers_back<PRODUCER_REGISTERS>();
    if (threadIdx.x < 32)
      for (; find(p, index, band); index += clusters)
        if (threadIdx.x == 0) load(p, shared, slice, band, at);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0) - 1;
    int group = -1;
    for (int turn = 0; find(p, index, band); index += clusters, ++turn) {
      if (band.group != group) {
        group = band.group;
        take_vectors(p.group[group], shared, slice * WIDTH, p.cols);
      }
      float acc[WIDTH / 2];
      multiply<T>(p.k_steps, p.slices, p.group[group].scaling, shared, warpgroup, at, acc);
      finish<T>(p, shared, slice, turn, band, acc);
    }
  }
  // No CTA ends while another may still send to it.
  cluster_sync();
}

}  // namespace snk::cuda::sm90
