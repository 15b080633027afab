// Hopper's own instructions (sm_90a) as functions: barriers in shared memory, clusters, the tensor
// copy engine, register reallocation. The PTX ISA (8.1) describes each.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace snk::cuda::sm90 {

// ---- Shared memory ------------------------------------------------------------------------------

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
__device__ inline uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// ---- Clusters -----------------------------------------------------------------------------------

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all CTAs of the cluster; also orders their shared memory accesses. A warp arrives
// as one, so its lanes meet first.
__device__ inline void cluster_sync() {
  __syncwarp();
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// The address, in the cluster's window, of what lies at `address` of this CTA in CTA `rank`.
__device__ inline uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Some whole warps of a CTA, by a barrier of their own; __syncthreads has the first.
template <int COUNT>
__device__ void consumer_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id + 1), "n"(COUNT) : "memory");
}
// Counts like the sync of those who wait, and goes on.
template <int COUNT>
__device__ void consumer_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id + 1), "n"(COUNT) : "memory");
}

// ---- Barriers -----------------------------------------------------------------------------------

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes fresh barriers visible to the other CTAs and to the copy engine; a cluster_sync follows.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}
// Arrives, and makes the phase wait for `bytes` of copies too. Copies may land before this: the
// arrival that is still missing keeps the phase open.
__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives at the same barrier of CTA `rank`.
__device__ inline void arrive_remote(uint32_t barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote_address(barrier, rank))
               : "memory");
}
// Waits until the phase of this parity is over; then the copies that it counted can be read.
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- Copies ---------------------------------------------------------------------------------------

// Makes what this thread wrote to shared memory visible to the copy engine.
__device__ inline void fence_before_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Copies `bytes` from `address` to the same place in CTA `rank`, where they count towards the barrier
// in the place of this one. Multiples of 16.
__device__ inline void send(uint32_t address, uint32_t rank, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(remote_address(address, rank)),
      "r"(address), "r"(bytes), "r"(remote_address(barrier, rank))
      : "memory");
}

__device__ inline void prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Copies the tile at (row, col) to shared memory; its bytes count towards the barrier. What lies
// outside the matrix becomes zero, and counts too.
__device__ inline void load_tile(uint32_t to, const CUtensorMap* map, int col, int row,
                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(col), "r"(row), "r"(barrier)
      : "memory");
}
// The same to that address, and barrier, of every CTA in the mask.
__device__ inline void load_tile(uint32_t to, const CUtensorMap* map, int col, int row,
                                 uint32_t barrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(col), "r"(row), "r"(barrier), "h"(ctas)
      : "memory");
}

// Has the tile at (row, col) brought into the L2 cache.
__device__ inline void prefetch_tile(const CUtensorMap* map, int col, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(col),
               "r"(row)
               : "memory");
}

// ---- Global memory ------------------------------------------------------------------------------

// As an instruction, because the compiler may take a uint4 apart.
__device__ inline void store_16_bytes(void* to, const uint32_t (&word)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
}

// ---- The kernel before in the stream --------------------------------------------------------------

// A launch may begin before that one ends (cudaLaunchAttributeProgrammaticStreamSerialization), so
// nothing in global memory is read or written before this.
__device__ inline void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- Registers ----------------------------------------------------------------------------------

// Executed by all four warps of a warpgroup; the counts of all warpgroups must fit together.
template <int COUNT>
__device__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

}  // namespace snk::cuda::sm90
