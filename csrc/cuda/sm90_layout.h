// Where things lie in the Hopper kernels: plain arithmetic that the compiler checks on the host.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SNK_HOST_DEVICE __host__ __device__
#else
#define SNK_HOST_DEVICE
#endif

namespace snk::cuda::sm90 {

// ---- What a launch must stay within -------------------------------------------------------------

// 8 CTAs are the largest portable cluster. Of more than 512 columns, what is left beside W is a ring
// too short for the way that x comes: there the GEMM of a library, and a pass behind it, are faster.
constexpr int MAX_SLICES = 8, MAX_STEPS = 4, MAX_STAGES = 16;
constexpr int MAX_SHARED = 227 * 1024;

// ---- Tiles of operands in shared memory --------------------------------------------------------

// An operand tile is a stack of rows of 64 halves of K (128 bytes): the span of the widest swizzle.
constexpr int TILE_K = 64, TILE_ROW_BYTES = 128;
// Tiles that are waited for together: the products of one alone are about as long as a wait.
constexpr int TILES = 2, STEP = TILES * TILE_K;
// The swizzle repeats every 8 rows, so a tile begins at a multiple of that.
constexpr int TILE_ALIGNMENT = 8 * TILE_ROW_BYTES;

// Where the copy engine (CU_TENSOR_MAP_SWIZZLE_128B) puts a byte of a tile's row: the index of its
// 16-byte chunk is XORed with the row's index modulo 8.
SNK_HOST_DEVICE constexpr uint32_t tile_offset(uint32_t row, uint32_t byte) {
  return row * TILE_ROW_BYTES + (byte ^ ((row % 8) << 4));
}

// The matrix descriptor by which wgmma finds a tile (PTX ISA, "Matrix descriptor format"; addresses
// and offsets are encoded as (x & 0x3FFFF) >> 4):
//   bits  0–13  start address
//   bits 16–29  leading byte offset: unused for a K-major tile whose rows are one swizzle span; 1
//   bits 32–45  stride byte offset: from one group of 8 rows to the next, 1024 bytes
//   bits 49–51  base offset: 0, as the tile begins at a multiple of 1024
//   bits 62–63  1 = 128-byte swizzle
// The swizzle works on address bits (4–6 ^= 7–9), so 16 halves further along K are simply a start
// address of 32 bytes more.
SNK_HOST_DEVICE constexpr uint64_t tile_descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 |
         uint64_t(TILE_ALIGNMENT >> 4) << 32 | uint64_t(1) << 62;
}

// Where wgmma reads the half (row, k) of an operand: the inverse view of the same swizzle.
SNK_HOST_DEVICE constexpr uint32_t operand_address(uint64_t descriptor, uint32_t row, uint32_t k) {
  const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4;
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t linear = start + row / 8 * stride + row % 8 * TILE_ROW_BYTES + 2 * k;
  return linear ^ ((linear >> 7 & 7) << 4);
}

constexpr bool wgmma_finds_what_the_copy_engine_wrote() {
  for (uint32_t tile : {0u, 7u * TILE_ALIGNMENT, 200u * TILE_ALIGNMENT})
    for (uint32_t row = 0; row < 64; ++row)
      for (uint32_t k = 0; k < TILE_K; ++k)
        if (operand_address(tile_descriptor(tile + k / 16 * 32), row, k % 16) !=
            tile + tile_offset(row, 2 * k))
          return false;
  return true;
}
static_assert(wgmma_finds_what_the_copy_engine_wrote());

// ---- The accumulator fragment of m64nNk16 -------------------------------------------------------

// Register i of lane l of warp w holds, with n = i / 4 counting groups of 8 columns:
//   row 16 w + l / 4 + 8 ((i / 2) % 2),  column 8 n + 2 (l % 4) + i % 2.

// ---- A ring of stages -------------------------------------------------------------------------

// Position in the ring. A barrier's phase bit flips each time that its phase completes; waiting for
// parity p returns once the phase of parity p is over. Readers wait for `phase` of "full", the
// writer for `phase ^ 1` of "empty", which a fresh barrier lets pass: the first round waits for
// nobody.
struct Ring {
  int stages, stage = 0;
  uint32_t phase = 0;
  SNK_HOST_DEVICE explicit constexpr Ring(int stages) : stages(stages) {}
  SNK_HOST_DEVICE constexpr void advance() { skip(1); }
  SNK_HOST_DEVICE constexpr void skip(int count) {
    for (stage += count; stage >= stages; stage -= stages) phase ^= 1;
  }
};

}  // namespace snk::cuda::sm90
