// csrc/cuda/sm90.h for the stand-in machine.
#pragma once

#include "cuda/sm90_layout.h"
#include "machine.h"

namespace snk::cuda::sm90 {

using machine::barrier;
using machine::current;

inline unsigned char* shared_memory() { return machine::memory[current->cta].data(); }
inline uint32_t shared_address(const void* pointer) {
  return uint32_t(current->cta) * machine::WINDOW +
         uint32_t(static_cast<const unsigned char*>(pointer) - shared_memory());
}
inline uint32_t cluster_rank() { return uint32_t(current->cta); }
inline uint32_t remote_address(uint32_t address, uint32_t rank) {
  machine::check(rank < machine::memory.size(), "no such CTA in the cluster");
  return address % machine::WINDOW + rank * machine::WINDOW;
}
inline void cluster_sync() {
  // It releases what came before.
  machine::wait_until([self = current] { return self->arrivals_in_flight == 0; });
  const long needed = long(machine::threads.size()) * ++current->syncs;
  ++machine::sync_arrivals;
  machine::wait_until([needed] { return machine::sync_arrivals >= needed; });
}

template <int COUNT>
void consumer_sync(int id) {
  long& arrivals = machine::cta_sync_arrivals[current->cta].at(id);
  const long needed = COUNT * ++current->cta_syncs.at(id);
  machine::check(++arrivals <= needed, "a thread too many at a barrier");
  machine::wait_until([&arrivals, needed] { return arrivals >= needed; });
}

template <int COUNT>
void consumer_arrive(int id) {
  const long needed = COUNT * ++current->cta_syncs.at(id);
  machine::check(++machine::cta_sync_arrivals[current->cta].at(id) <= needed,
                 "a thread too many at a barrier");
}

inline void barrier_init(uint32_t address, uint32_t arrivals) {
  machine::check(address % 8 == 0 && !machine::barriers.count(address), "a bad or double barrier");
  machine::barriers[address] = {int(arrivals), int(arrivals), 0, 0};
  std::memset(machine::at(address), 0, 8);
}
inline void fence_barrier_init() {}
inline void wait_for_kernel_before() {}
inline void arrive_expecting(uint32_t address, uint32_t bytes) {
  auto& b = barrier(address);
  b.bytes += int(bytes);
  --b.missing;
  machine::settle(b);
}
inline void arrive(uint32_t address) {
  auto& b = barrier(address);
  --b.missing;
  machine::settle(b);
}
inline void count_bytes(uint32_t address, int bytes) {
  auto& b = barrier(address);
  b.bytes -= bytes;
  machine::settle(b);
}
inline void arrive_remote(uint32_t address, uint32_t rank) {
  const uint32_t remote = remote_address(address, rank);
  machine::Thread* const sender = current;
  ++sender->arrivals_in_flight;
  machine::later(remote, [=] {
    --sender->arrivals_in_flight;
    auto& b = barrier(remote);
    --b.missing;
    machine::settle(b);
  });
}
inline void wait(uint32_t address, uint32_t parity) {
  machine::wait_until([&b = barrier(address), parity] { return b.phase != parity; });
}

inline void fence_before_copies() {}
inline void send(uint32_t address, uint32_t rank, uint32_t bytes, uint32_t full) {
  const uint32_t to = remote_address(address, rank), remote = remote_address(full, rank);
  machine::check(address % 16 == 0 && bytes % 16 == 0, "a copy is not aligned");
  std::memset(machine::at(to), 0xff, bytes);
  machine::later(remote, [=] {
    std::memcpy(machine::at(to), machine::at(address), bytes);
    count_bytes(remote, int(bytes));
  });
}
inline void prefetch(const CUtensorMap*) {}
inline void prefetch_tile(const CUtensorMap*, int, int) {}
inline void load_tile(uint32_t to, const CUtensorMap* description, int col, int row, uint32_t full,
                      uint16_t ctas) {
  machine::Map map;
  std::memcpy(&map, description, sizeof map);
  const int bytes = map.tile_rows * TILE_ROW_BYTES;
  machine::check(to % TILE_ALIGNMENT == 0, "a tile is not aligned to its swizzle");
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (!(ctas >> rank & 1)) continue;
    const uint32_t target = remote_address(to, rank), remote = remote_address(full, rank);
    std::memset(machine::at(target), 0xff, bytes);
    machine::later(remote, [=] {
      for (int i = 0; i < map.tile_rows; ++i)
        for (int k = 0; k < TILE_K; ++k) {
          const bool inside = row + i < map.rows && col + k < map.cols;
          const uint16_t value =
              inside ? map.data[size_t(row + i) * map.cols + col + k] : uint16_t(0);
          std::memcpy(machine::at(target + tile_offset(i, 2 * k)), &value, 2);
        }
      count_bytes(remote, bytes);
    });
  }
}
inline void load_tile(uint32_t to, const CUtensorMap* map, int col, int row, uint32_t full) {
  load_tile(to, map, col, row, full, uint16_t(1 << current->cta));
}

inline void store_16_bytes(void* to, const uint32_t (&word)[4]) {
  machine::check(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a store is not aligned");
  std::memcpy(to, word, 16);
}

template <int COUNT>
void give_registers_back() {}
template <int COUNT>
void take_registers() {}

}  // namespace snk::cuda::sm90
