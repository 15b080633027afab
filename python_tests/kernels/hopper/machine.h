// A stand-in for a Hopper cluster, enough to run csrc/cuda/stitch_layer_norm_sm90.h on the host and
// see whether every tile, fragment, phase and mask is where it should be. Threads are fibers that a
// seeded scheduler resumes in random order. Whatever is asynchronous on the chip (copies, arrivals
// at another CTA, products) is late on purpose: a copy spoils its target when it is issued and
// writes it at a random later moment, and a product reads its operands when it is waited for.
// What it cannot show: speed, memory ordering, and whether its own idea of the instructions
// is right.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace machine {

constexpr int WINDOW = 1 << 18;  // a CTA's part of the cluster's shared addresses
constexpr int STACK = 64 * 1024;

inline void check(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "machine: %s\n", what);
  std::exit(2);
}

struct Index {
  unsigned x;
};
struct Barrier {
  int arrivals = 0, missing = 0, bytes = 0;
  uint32_t phase = 0;
};
struct Warp {
  uint32_t value[2][32];
  long deposits[2] = {0, 0};
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  Index thread, block;
  int cta;
  Warp* warp;
  long exchanges = 0, syncs = 0, arrivals_in_flight = 0;
  std::array<long, 6> cta_syncs{};  // by barrier
  std::vector<std::vector<std::function<void()>>> products{1};  // by group; the last one is open
  long asleep_until = 0;
  std::function<bool()> ready = [] { return true; };
  bool over = false;
};
struct Operation {
  int to;  // CTA of the cluster
  long due;
  std::function<void()> land;
};

inline std::mt19937 random_source;
inline ucontext_t scheduler;
inline Thread* current;
inline Index grid;
inline std::vector<std::vector<unsigned char>> memory;  // by CTA of the cluster
inline std::map<uint32_t, Barrier> barriers;
inline std::vector<Operation> in_flight;
inline std::vector<std::unique_ptr<Thread>> threads;
inline long sync_arrivals;
inline std::vector<std::array<long, 6>> cta_sync_arrivals;  // by CTA and barrier
inline long now, last_event;  // in rounds of the scheduler

// Mostly short, now and then longer than a band of rows takes.
inline long random_delay() { return random_source() % (random_source() % 32 ? 4 : 400); }
// What is under way to another CTA can be later still, later than an epilogue.
inline void later(uint32_t address, std::function<void()> land) {
  const long due = now + random_delay() * (random_source() % 2 ? 1 : 10);
  in_flight.push_back({int(address) / WINDOW, due, std::move(land)});
}

template <typename Condition>
void wait_until(Condition condition) {
  if (condition()) return;
  current->ready = condition;
  swapcontext(&current->context, &scheduler);
}
inline unsigned char* at(uint32_t address) {
  return memory[address / WINDOW].data() + address % WINDOW;
}

inline Barrier& barrier(uint32_t address) {
  const auto found = barriers.find(address);
  check(found != barriers.end(), "a barrier was used before it was made");
  return found->second;
}
inline void settle(Barrier& b) {
  last_event = now;
  check(b.missing >= 0, "more arrivals than a phase takes");
  check(std::abs(b.bytes) < 1 << 20, "a barrier's byte count overflows");
  if (b.missing == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.missing = b.arrivals;
  }
}

// What every lane of the warp has brought, once all have come.
inline const uint32_t* exchange(uint32_t value) {
  Thread& self = *current;
  const int lane = self.thread.x % 32, set = self.exchanges % 2;
  const long needed = 32 * (self.exchanges / 2 + 1);
  ++self.exchanges;
  self.warp->value[set][lane] = value;
  ++self.warp->deposits[set];
  wait_until([&warp = *self.warp, set, needed] { return warp.deposits[set] >= needed; });
  return self.warp->value[set];
}
inline uint32_t exchange(uint32_t value, int source) { return exchange(value)[source]; }

inline void run_cluster(const std::function<void()>& kernel, int first, int ctas,
                        int threads_per_cta, int shared_bytes) {
  static const std::function<void()>* body;
  body = &kernel;
  check(shared_bytes <= 227 * 1024, "more shared memory than a CTA can have");
  memory.assign(ctas, std::vector<unsigned char>(WINDOW, 0xff));
  barriers.clear();
  threads.clear();
  sync_arrivals = 0;
  cta_sync_arrivals.assign(ctas, {});
  std::vector<Warp> warps(ctas * threads_per_cta / 32);
  std::vector<long> start(ctas);
  for (long& moment : start) moment = now + random_delay();
  for (int i = 0; i < ctas * threads_per_cta; ++i) {
    auto thread = std::make_unique<Thread>();
    thread->thread = {unsigned(i % threads_per_cta)};
    thread->cta = i / threads_per_cta;
    thread->block = {unsigned(first + thread->cta)};
    thread->warp = &warps[i / 32];
    thread->asleep_until = start[thread->cta];
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack.get();
    thread->context.uc_stack.ss_size = STACK;
    thread->context.uc_link = &scheduler;
    makecontext(&thread->context, +[] {
      (*body)();
      current->over = true;
    }, 0);
    threads.push_back(std::move(thread));
  }

  std::vector<Thread*> alive;
  for (auto& thread : threads) alive.push_back(thread.get());
  std::vector<int> alive_in(ctas, threads_per_cta);
  for (last_event = now; !alive.empty(); ++now) {
    check(now < last_event + 20000, "deadlock");
    std::shuffle(alive.begin(), alive.end(), random_source);
    // A whole CTA falls behind now and then, and so does a warp.
    if (random_source() % 16 == 0) {
      const Thread* victim = alive[random_source() % alive.size()];
      const long until = now + random_delay();
      const bool only_warp = random_source() % 2;
      for (Thread* thread : alive)
        if (only_warp ? thread->warp == victim->warp : thread->cta == victim->cta)
          thread->asleep_until = std::max(thread->asleep_until, until);
    }
    for (Thread* thread : alive) {
      if (thread->asleep_until > now || !thread->ready()) continue;
      current = thread;
      swapcontext(&scheduler, &thread->context);
      alive_in[thread->cta] -= thread->over;
    }
    const auto ended = [](const Thread* thread) { return thread->over; };
    alive.erase(std::remove_if(alive.begin(), alive.end(), ended), alive.end());
    std::vector<Operation> waiting;
    waiting.swap(in_flight);
    std::shuffle(waiting.begin(), waiting.end(), random_source);
    for (Operation& operation : waiting) {
      check(alive_in[operation.to] > 0, "something was in flight to a CTA that has ended");
      if (operation.due <= now) operation.land();
      else in_flight.push_back(std::move(operation));
    }
  }
  for (const auto& bytes : memory)
    check(std::all_of(bytes.begin() + shared_bytes, bytes.end(),
                      [](unsigned char byte) { return byte == 0xff; }),
          "written beyond the shared memory asked for");
}

// Clusters know nothing of each other, so they run one after another.
inline void run(const std::function<void()>& kernel, int ctas, int cluster, int threads_per_cta,
                int shared_bytes) {
  grid = {unsigned(ctas)};
  for (int first = 0; first < ctas; first += cluster)
    run_cluster(kernel, first, cluster, threads_per_cta, shared_bytes);
}

// What tensor_map.h tells the copy engine.
struct Map {
  const uint16_t* data;
  int rows, cols, tile_rows;
};
inline void make_map(CUtensorMap& to, const uint16_t* data, int rows, int cols, int tile_rows) {
  const Map map{data, rows, cols, tile_rows};
  std::memcpy(&to, &map, sizeof map);
}

}  // namespace machine

#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (machine::current->thread)
#define blockIdx (machine::current->block)
#define gridDim (machine::grid)
using std::max;
using std::min;

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <typename V>
V __shfl_xor_sync(unsigned, V value, int distance) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word = machine::exchange(word, int(threadIdx.x % 32) ^ distance);
  std::memcpy(&value, &word, 4);
  return value;
}
inline int __shfl_sync(unsigned, int value, int source) {
  return int(machine::exchange(uint32_t(value), source));
}
inline int __shfl_up_sync(unsigned, int value, int distance) {
  const int lane = int(threadIdx.x % 32);
  return int(machine::exchange(uint32_t(value), lane < distance ? lane : lane - distance));
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint32_t* votes = machine::exchange(vote);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= votes[lane] << lane;
  return all;
}
inline void __syncwarp() { machine::exchange(0); }
inline int __ffs(int word) { return __builtin_ffs(word); }
