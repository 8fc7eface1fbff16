// Runs CUDA kernels on the host, thread by thread, so that machines without a GPU test the kernels'
// own source: compile it with -DLIGHTNING_MAT_EMULATOR and this folder among the include paths.
//
// Every CUDA thread has a stack of its own; one host thread switches between them where they wait:
// at barriers, at functions of a whole warp, at fences and atomics. A seed decides the order of
// blocks and of threads, so a schedule that fails can be run again.
//
// Emulated: thread and block indices (x only), __syncthreads, __syncwarp, shuffles, mma fragments
// as the PTX manual lays them out, copies that arrive when they are waited for, dynamic shared
// memory of exactly the requested size that starts as NaN, several blocks at a time. Reported as an
// emulator::Error: a barrier that some threads never reach or reach at another line, a function of
// a warp that some lanes do not call, writes behind the shared memory, loads of 16 bytes from
// elsewhere than a multiple of 16.
//
// Not emulated: caches, timing, bank conflicts, how tensor cores round their sums (here: float32,
// one addition after the other), and two threads that run at the very same moment. For the last,
// compile with -fsanitize=thread: barriers, __syncwarp and fences order memory there as they do on
// a GPU, and nothing else does, neither shuffles nor products nor one block running after another.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = size_t{256} << 10;

// What the thread sanitizer has to know: each CUDA thread is a thread of its own to it, the
// emulator's bookkeeping is not the kernel's memory, and memory is ordered where a GPU orders it.
#ifdef __SANITIZE_THREAD__
constexpr bool kRaces = true;
inline void* this_fiber() { return __tsan_get_current_fiber(); }
inline void* new_fiber() { return __tsan_create_fiber(0); }
inline void delete_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
// Always inlined: the sanitizer must not see a function that one fiber enters and another leaves.
[[gnu::always_inline]] inline void enter_fiber(void* fiber) {
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}
inline void release(void* token) { __tsan_release(token); }
inline void acquire(void* token) { __tsan_acquire(token); }
struct Unwatched {
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
constexpr bool kRaces = false;
inline void* this_fiber() { return nullptr; }
inline void* new_fiber() { return nullptr; }
inline void delete_fiber(void*) {}
inline void enter_fiber(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
struct Unwatched {
  Unwatched() {}
};
#endif

// Bytes behind the shared memory whose change tells of a write out of bounds; the address sanitizer
// sees the write itself.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 256;
#endif

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A call in the kernel's source.
struct Place {
  const char* function;
  const char* file;
  int line;

  bool operator==(const Place& other) const {
    return line == other.line && !std::strcmp(function, other.function) &&
           !std::strcmp(file, other.file);
  }
  std::string text() const {
    return std::string(function) + " (" + file + ":" + std::to_string(line) + ")";
  }
};

struct Thread;

struct Barrier {
  unsigned members = 0;
  unsigned phase = 0;
  Place place{};
  std::vector<Thread*> waiting;
  char tokens[2];  // one for even and one for odd phases: the next may begin while this one ends
};

struct Warp {
  Barrier barrier;
  // What the lanes hand each other, for even and odd phases of the barrier.
  alignas(16) unsigned char exchange[2][kWarp][32];
};

struct Block;

// 16 bytes on their way, or zeros.
struct Copy {
  uint4* to;
  const uint4* from;
};

struct Thread {
  Block* block;
  unsigned index;
  bool done;
  std::deque<std::vector<Copy>> copies;  // in groups; the last one is still open
  void* fiber;
  std::unique_ptr<char[]> stack;
  ucontext_t context;
};

struct Block {
  unsigned index;
  unsigned running;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  std::unique_ptr<unsigned char[]> shared;
};

struct Options {
  uint64_t seed = 0;      // of the order of blocks and threads
  unsigned resident = 1;  // blocks that run at a time
};

struct Grid {
  std::function<void()> kernel;
  unsigned blocks, threads;
  size_t shared_bytes;
  std::mt19937_64 random;
  std::vector<Thread*> ready;
  std::string error;
  void* fiber;
  ucontext_t context;
  char start, fence, end;  // tokens

  size_t draw(size_t below) { return static_cast<size_t>(random() % below); }
};

inline Grid* grid;      // the launch that runs
inline Thread* thread;  // the CUDA thread that runs

// Back to the scheduler, until it picks this thread again.
inline void pause() {
  ucontext_t *mine, *scheduler;
  void* fiber;
  {
    const Unwatched unwatched;
    mine = &thread->context;
    scheduler = &grid->context;
    fiber = grid->fiber;
  }
  enter_fiber(fiber);
  swapcontext(mine, scheduler);
}

inline void fail(const std::string& message) {
  const Unwatched unwatched;
  grid->error = "block " + std::to_string(thread->block->index) + ", thread " +
                std::to_string(thread->index) + ": " + message;
  pause();  // for good
}

// Lets other threads, and other blocks, go first.
inline void yield() {
  const Unwatched unwatched;
  grid->ready.push_back(thread);
  pause();
}

inline void wait(Barrier& barrier, Place place, bool orders_memory) {
  char* token;
  {
    const Unwatched unwatched;
    token = &barrier.tokens[barrier.phase % 2];
    if (barrier.waiting.empty()) {
      barrier.place = place;
    } else if (!(barrier.place == place)) {
      fail("waits at " + place.text() + " while others wait at " + barrier.place.text());
    }
  }
  if (orders_memory) release(token);
  {
    const Unwatched unwatched;
    barrier.waiting.push_back(thread);
    if (barrier.waiting.size() == barrier.members) {
      ++barrier.phase;
      grid->ready.insert(grid->ready.end(), barrier.waiting.begin(), barrier.waiting.end());
      barrier.waiting.clear();
    }
    pause();
  }
  if (orders_memory) acquire(token);
}

inline Warp& this_warp() { return thread->block->warps[thread->index / kWarp]; }

// Every lane gives `mine`; result(all) sees what the warp's lanes gave. Orders no other memory.
template <class T, class Result>
auto exchange(const T& mine, Place place, Result result) {
  static_assert(sizeof(T) <= sizeof(Warp::exchange[0][0]));
  const Unwatched unwatched;
  Warp& warp = this_warp();
  auto& slots = warp.exchange[warp.barrier.phase % 2];
  std::memcpy(slots[thread->index % kWarp], &mine, sizeof(T));
  wait(warp.barrier, place, false);
  return result([&](unsigned lane) {
    T given;
    std::memcpy(&given, slots[lane], sizeof(T));
    return given;
  });
}

inline void run_thread() {
  Grid* launched;
  {
    const Unwatched unwatched;
    launched = grid;
  }
  acquire(&launched->start);
  launched->kernel();
  release(&launched->end);
  {
    const Unwatched unwatched;
    for (const auto& group : thread->copies) {
      if (!group.empty()) fail("returns while its copies are under way");
    }
    thread->done = true;
    --thread->block->running;
  }
  pause();  // for good
}

inline void prepare(Thread& t) {
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack.get();
  t.context.uc_stack.ss_size = kStack;
  t.context.uc_link = nullptr;
  makecontext(&t.context, run_thread, 0);
}

inline std::unique_ptr<Block> start_block(unsigned index,
                                          std::vector<std::unique_ptr<Block>>& old) {
  std::unique_ptr<Block> block;
  if (old.empty()) {
    block = std::make_unique<Block>();
    block->threads.resize(grid->threads);
    block->warps.resize((grid->threads + kWarp - 1) / kWarp);
    for (Thread& t : block->threads) t.stack.reset(new char[kStack]);
    block->shared.reset(new unsigned char[grid->shared_bytes + kGuard]);
  } else {
    block = std::move(old.back());
    old.pop_back();
  }
  block->index = index;
  block->running = grid->threads;
  block->barrier = {};
  block->barrier.members = grid->threads;
  for (size_t w = 0; w < block->warps.size(); ++w) {
    block->warps[w].barrier = {};
    block->warps[w].barrier.members =
        std::min(kWarp, grid->threads - static_cast<unsigned>(w) * kWarp);
  }
  std::memset(block->shared.get(), 0xff, grid->shared_bytes + kGuard);
  for (unsigned i = 0; i < grid->threads; ++i) {
    Thread& t = block->threads[i];
    t.block = block.get();
    t.index = i;
    t.done = false;
    t.copies.assign(1, {});
    t.fiber = new_fiber();
    prepare(t);
    grid->ready.push_back(&t);
  }
  release(&grid->start);
  return block;
}

// Why nobody can go on.
inline std::string deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  for (const auto& block : blocks) {
    const unsigned returned = grid->threads - block->running;
    const auto stuck = [&](const Barrier& barrier, const std::string& who) {
      return who + ": " + std::to_string(barrier.waiting.size()) + " of " +
             std::to_string(barrier.members) + " threads wait at " + barrier.place.text() + ", " +
             std::to_string(returned) + " threads of the block have returned";
    };
    const std::string name = "block " + std::to_string(block->index);
    for (size_t w = 0; w < block->warps.size(); ++w) {
      const Barrier& barrier = block->warps[w].barrier;
      if (!barrier.waiting.empty()) return stuck(barrier, name + ", warp " + std::to_string(w));
    }
    if (!block->barrier.waiting.empty()) return stuck(block->barrier, name);
  }
  return "nobody waits, yet nobody runs";
}

inline std::string guard_error(const Block& block) {
  const unsigned char* guard = block.shared.get() + grid->shared_bytes;
  if (std::all_of(guard, guard + kGuard, [](unsigned char c) { return c == 0xff; })) return "";
  return "block " + std::to_string(block.index) + " wrote behind its shared memory of " +
         std::to_string(grid->shared_bytes) + " bytes";
}

inline std::string run_grid(unsigned resident) {
  std::vector<unsigned> order(grid->blocks);
  for (unsigned b = 0; b < grid->blocks; ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), grid->random);

  std::vector<std::unique_ptr<Block>> active, old;
  std::string error;
  while (error.empty()) {
    while (active.size() < std::max(1u, resident) && !order.empty()) {
      active.push_back(start_block(order.back(), old));
      order.pop_back();
    }
    if (active.empty()) break;
    if (grid->ready.empty()) {
      error = deadlock(active);
      break;
    }
    std::swap(grid->ready[grid->draw(grid->ready.size())], grid->ready.back());
    thread = grid->ready.back();
    grid->ready.pop_back();
    ucontext_t *const scheduler = &grid->context, *const next = &thread->context;
    enter_fiber(thread->fiber);
    swapcontext(scheduler, next);
    error = grid->error;
    if (!thread->done) continue;
    delete_fiber(thread->fiber);
    if (thread->block->running != 0) continue;
    const auto place = std::find_if(active.begin(), active.end(),
                                    [](const auto& b) { return b.get() == thread->block; });
    if (error.empty()) error = guard_error(**place);
    // New memory has no past for the sanitizer to compare the next block with.
    if (!kRaces) old.push_back(std::move(*place));
    active.erase(place);
  }
  acquire(&grid->end);
  return error;
}

// kernel<<<blocks, threads, shared_bytes>>>(arguments...), finished when this returns.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes,
            Options options, Arguments... arguments) {
  const Unwatched unwatched;
  Grid launched{};
  launched.kernel = [&] { kernel(arguments...); };
  launched.blocks = blocks;
  launched.threads = threads;
  launched.shared_bytes = shared_bytes;
  launched.random.seed(options.seed);
  launched.fiber = this_fiber();
  grid = &launched;
  const std::string error = run_grid(options.resident);
  grid = nullptr;
  if (!error.empty()) throw Error(error);
}

struct Index {
  unsigned x, y = 0, z = 0;
};
inline Index thread_index() {
  const Unwatched unwatched;
  return {thread->index};
}
inline Index block_index() {
  const Unwatched unwatched;
  return {thread->block->index};
}
inline Index block_size() {
  const Unwatched unwatched;
  return {grid->threads, 1, 1};
}
inline Index grid_size() {
  const Unwatched unwatched;
  return {grid->blocks, 1, 1};
}

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

// The place of the call, for the functions below: a default argument takes the caller's line.
#define EMULATOR_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_CALLER) {
  emulator::Block* block;
  {
    const emulator::Unwatched unwatched;
    block = emulator::thread->block;
  }
  emulator::wait(block->barrier, {"__syncthreads", file, line}, true);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_CALLER) {
  if (mask != 0xffffffffu) emulator::fail("__syncwarp of a part of a warp is not emulated");
  emulator::Warp* warp;
  {
    const emulator::Unwatched unwatched;
    warp = &emulator::this_warp();
  }
  emulator::wait(warp->barrier, {"__syncwarp", file, line}, true);
}

template <class T>
T __shfl_sync(unsigned mask, T mine, int from, EMULATOR_CALLER) {
  if (mask != 0xffffffffu) emulator::fail("__shfl_sync of a part of a warp is not emulated");
  return emulator::exchange(mine, {"__shfl_sync", file, line}, [&](auto given) {
    return given(static_cast<unsigned>(from) % emulator::kWarp);
  });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T mine, int step, EMULATOR_CALLER) {
  if (mask != 0xffffffffu) emulator::fail("__shfl_xor_sync of a part of a warp is not emulated");
  const unsigned lane = threadIdx.x % emulator::kWarp;
  return emulator::exchange(mine, {"__shfl_xor_sync", file, line}, [&](auto given) {
    return given((lane ^ static_cast<unsigned>(step)) % emulator::kWarp);
  });
}

// Orders memory between blocks, if the other side has a fence too.
inline void __threadfence() {
  emulator::acquire(&emulator::grid->fence);
  emulator::release(&emulator::grid->fence);
  emulator::yield();
}

inline unsigned atomicAdd(unsigned* counter, unsigned more) {
  // Unwatched: the last block may reset a counter by a plain store.
  const emulator::Unwatched unwatched;
  emulator::yield();
  const unsigned before = *counter;
  *counter += more;
  emulator::yield();
  return before;
}

inline uint32_t __float_as_uint(float x) { return emulator::float_bits(x); }
inline float __uint_as_float(uint32_t bits) { return emulator::bits_float(bits); }

inline float __bfloat162float(__nv_bfloat16 x) {
  return emulator::bits_float(static_cast<uint32_t>(x.bits) << 16);
}

inline float __half2float(__half x) {
  const int sign = x.bits >> 15, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float size;
  if (exponent == 31) {
    size = fraction == 0 ? INFINITY : NAN;
  } else {
    size = std::ldexp(static_cast<float>(exponent == 0 ? fraction : fraction + 1024),
                      std::max(exponent, 1) - 25);
  }
  return sign ? -size : size;
}

// To the nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = emulator::float_bits(x);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline __half __float2half_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint16_t sign = static_cast<uint16_t>(emulator::float_bits(x) >> 16 & 0x8000u);
  const float size = std::fabs(x);
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  // In units of the last place; a fraction of 1024 carries into the exponent by itself.
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign + (exponent + 14) * 1024 + steps)};
}

// What csrc/cuda/device.h has for the GPU; its comments hold here too.
namespace lightning_mat {

inline unsigned char* shared_memory() {
  const emulator::Unwatched unwatched;
  return emulator::thread->block->shared.get();
}

struct MmaOperands {
  uint32_t a[4], b[2];
};

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     EMULATOR_CALLER) {
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulator::exchange(mine, {"mma_tf32", file, line}, [&](auto given) {
    const auto value = [](uint32_t bits) { return emulator::bits_float(bits & 0xffffe000u); };
    for (unsigned k = 0; k < 8; ++k) {
      const unsigned half = k / 4;
      const MmaOperands row = given(g * 4 + k % 4);
      for (unsigned j = 0; j < 2; ++j) {
        const MmaOperands column = given((2 * t + j) * 4 + k % 4);
        d[j] += value(row.a[2 * half]) * value(column.b[half]);
        d[2 + j] += value(row.a[2 * half + 1]) * value(column.b[half]);
      }
    }
    return 0;
  });
}

template <class Value>
void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Place place,
            Value value) {
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulator::exchange(mine, place, [&](auto given) {
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned half = k / 8, from = k % 8 / 2, shift = k % 2 * 16;
      const auto element = [&](uint32_t pair) {
        return value(static_cast<uint16_t>(pair >> shift));
      };
      const MmaOperands row = given(g * 4 + from);
      for (unsigned j = 0; j < 2; ++j) {
        const MmaOperands column = given((2 * t + j) * 4 + from);
        d[j] += element(row.a[2 * half]) * element(column.b[half]);
        d[2 + j] += element(row.a[2 * half + 1]) * element(column.b[half]);
      }
    }
    return 0;
  });
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     EMULATOR_CALLER) {
  mma_16(d, a, b, {"mma_bf16", file, line},
         [](uint16_t bits) { return __bfloat162float(__nv_bfloat16{bits}); });
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    EMULATOR_CALLER) {
  mma_16(d, a, b, {"mma_f16", file, line},
         [](uint16_t bits) { return __half2float(__half{bits}); });
}

inline uint32_t to_tf32(float x) {
  if (std::isnan(x)) return 0x7fffe000u;
  return (emulator::float_bits(x) + 0x1000u) & 0xffffe000u;
}

inline uint4 load_16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulator::fail("load_16 from an unaligned address");
  return *static_cast<const uint4*>(p);
}

// Until the wait that covers the copy, its place holds NaN.
inline void copy_16(uint4* to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 ||
      (inside && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
    emulator::fail("copy_16 between unaligned addresses");
  }
  *to = {~0u, ~0u, ~0u, ~0u};
  const emulator::Unwatched unwatched;
  emulator::thread->copies.back().push_back(
      {to, inside ? static_cast<const uint4*>(from) : nullptr});
}

inline void end_group() {
  const emulator::Unwatched unwatched;
  emulator::thread->copies.emplace_back();
}

template <int kLater>
void wait_for_groups() {
  std::vector<emulator::Copy> due;
  {
    const emulator::Unwatched unwatched;
    auto& groups = emulator::thread->copies;
    for (; groups.size() > kLater + 1; groups.pop_front()) {
      due.insert(due.end(), groups.front().begin(), groups.front().end());
    }
  }
  for (const emulator::Copy& copy : due) *copy.to = copy.from ? *copy.from : uint4{0, 0, 0, 0};
}

inline float load_fresh(const float* p) { return *p; }
inline double load_fresh(const double* p) { return *p; }
inline float4 load_fresh(const float4* p) { return *p; }

inline unsigned take_ticket(unsigned* counter) { return atomicAdd(counter, 1u); }

}  // namespace lightning_mat
