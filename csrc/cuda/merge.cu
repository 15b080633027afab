// W + s · B A for the stitches of one or many groups in one launch, as the dtype of the tokens.
#include <mma.h>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/number.h"

namespace snk::cuda {
namespace {

// A CTA makes a tile of TILE × TILE, each warp 16 rows of it, by steps of TILE along the rank.
constexpr int TILE = 64, THREADS = TILE / 16 * 32, PIECE = 8;
// From row to row in shared memory, so that those of one column lie in different banks.
constexpr int HALVES = TILE + 8, FLOATS = TILE + 4;
constexpr int MAX_GROUPS = 32;

struct Operands {
  const void *weight, *lora_A, *lora_B;
  float scaling;
  int rank;  // a multiple of PIECE, like the number of columns
};
struct Arguments {
  Operands group[MAX_GROUPS];
  void* merged;
  int rows, cols;
};

// Adjacent values, read and written 16 bytes at a time.
template <typename T>
struct alignas(16) Piece {
  T value[PIECE];
};

// A tile of a (rows, cols) matrix from (row, col) on, rounded to T; zero beyond.
template <typename T, typename S>
__device__ void stage(const S* from, int rows, int cols, int row, int col, T (&to)[TILE][HALVES]) {
#pragma unroll 2
  for (int i = threadIdx.x; i < TILE * TILE / PIECE; i += THREADS) {
    const int r = i / (TILE / PIECE), c = i % (TILE / PIECE) * PIECE;
    Piece<S> piece{};
    if (row + r < rows && col + c < cols)
      piece = *reinterpret_cast<const Piece<S>*>(from + int64_t(row + r) * cols + col + c);
    Piece<T> rounded;
#pragma unroll
    for (int j = 0; j < PIECE; ++j) rounded.value[j] = from_float<T>(to_float(piece.value[j]));
    *reinterpret_cast<Piece<T>*>(&to[r][c]) = rounded;
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(THREADS) merge_kernel(const __grid_constant__ Arguments p) {
  using namespace nvcuda;
  // The factors, and once these are used up, the product.
  __shared__ union alignas(32) {  // as wmma asks
    struct {
      T b[TILE][HALVES], a[TILE][HALVES];
    } factors;
    float product[TILE][FLOATS];
  } shared;
  const Operands& own = p.group[blockIdx.z];
  const int row = blockIdx.y * TILE, col = blockIdx.x * TILE, warp = threadIdx.x / 32;

  // The next kernel may come up meanwhile; it waits for this one's end before it reads.
  asm volatile("griddepcontrol.launch_dependents;");
  // W is on its way while the product is made.
  constexpr int PIECES = TILE * TILE / PIECE / THREADS;
  Piece<S> weight[PIECES];
  const auto place = [&](int i, int& r, int& c) {
    r = (i * THREADS + int(threadIdx.x)) / (TILE / PIECE);
    c = (i * THREADS + int(threadIdx.x)) % (TILE / PIECE) * PIECE;
    return row + r < p.rows && col + c < p.cols;
  };
  const auto offset = [&](int r, int c) { return int64_t(row + r) * p.cols + col + c; };
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    int r, c;
    if (place(i, r, c))
      weight[i] = *reinterpret_cast<const Piece<S>*>(static_cast<const S*>(own.weight) + offset(r, c));
  }

  wmma::fragment<wmma::accumulator, 16, 16, 16, float> acc[TILE / 16];
  for (auto& fragment : acc) wmma::fill_fragment(fragment, 0.0f);
  for (int r = 0; r < own.rank; r += TILE) {
    __syncthreads();
    stage(static_cast<const S*>(own.lora_B), p.rows, own.rank, row, r, shared.factors.b);
    stage(static_cast<const S*>(own.lora_A), own.rank, p.cols, r, col, shared.factors.a);
    __syncthreads();
    for (int k = 0; k < TILE && r + k < own.rank; k += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> b;
      wmma::load_matrix_sync(b, &shared.factors.b[warp * 16][k], HALVES);
#pragma unroll
      for (int i = 0; i < TILE / 16; ++i) {
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major> a;
        wmma::load_matrix_sync(a, &shared.factors.a[k][i * 16], HALVES);
        wmma::mma_sync(acc[i], b, a, acc[i]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < TILE / 16; ++i)
    wmma::store_matrix_sync(&shared.product[warp * 16][i * 16], acc[i], FLOATS,
                            wmma::mem_row_major);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    int r, c;
    if (!place(i, r, c)) continue;
    Piece<T> sum;
#pragma unroll
    for (int j = 0; j < PIECE; ++j)
      sum.value[j] = from_float<T>(to_float(weight[i].value[j]) +
                                   own.scaling * shared.product[r][c + j]);
    T* const to = static_cast<T*>(p.merged) + int64_t(blockIdx.z) * p.rows * p.cols;
    *reinterpret_cast<Piece<T>*>(to + offset(r, c)) = sum;
  }
}

template <typename T, typename S>
cudaError_t launch(const Merge& p) {
  Arguments arguments{};
  arguments.rows = int(p.merged.rows / p.groups);
  arguments.cols = int(p.merged.cols);
  const auto tiles = [](int size) { return unsigned((size + TILE - 1) / TILE); };
  cudaError_t error = cudaSuccess;
  for (int first = 0; first < p.groups && error == cudaSuccess; first += MAX_GROUPS) {
    const int count = p.groups - first < MAX_GROUPS ? p.groups - first : MAX_GROUPS;
    arguments.merged =
        static_cast<T*>(p.merged.data) + int64_t(first) * arguments.rows * arguments.cols;
    for (int i = 0; i < count; ++i) {
      const LowRank& from = p.stitches[first + i];
      arguments.group[i] = {from.weight.data, from.lora_A.data, from.lora_B.data, from.scaling,
                            int(from.lora_A.rows)};
    }
    const dim3 grid(tiles(arguments.cols), tiles(arguments.rows), unsigned(count));
    merge_kernel<T, S><<<grid, THREADS, 0, static_cast<cudaStream_t>(p.stream)>>>(arguments);
    error = cudaGetLastError();
  }
  return error;
}

template <typename T>
cudaError_t launch_for_source(const Merge& p) {
  if (p.stitches[0].weight.dtype == DType::f32) return launch<T, float>(p);
  if (p.stitches[0].weight.dtype == p.merged.dtype) return launch<T, T>(p);
  return cudaErrorInvalidValue;
}

}  // namespace

int merge(const Merge& p) {
  if (p.merged.rows == 0 || p.merged.cols == 0) return cudaSuccess;
  return on_device(p.device, [&] {
    switch (p.merged.dtype) {
      case DType::f16: return launch_for_source<__half>(p);
      case DType::bf16: return launch_for_source<__nv_bfloat16>(p);
      default: return cudaErrorInvalidValue;
    }
  });
}

}  // namespace snk::cuda
