// The CUDA kernels in the emulator, as a library that tests/mntk/test_emulated.py calls. Functions
// return null, or what went wrong.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/ghost_kernel.h"
#include "cuda/gram_kernel.h"
#include "cuda/gram_launch.h"
#include "cuda/rows_kernel.h"
#include "cuda/spectrum_kernel.h"
#include "mntk.h"
#include "work.h"

namespace lightning_mat {
namespace {

// One product of a warp, with fragments read and written as cuda/device.h describes them.
template <int kDepth, class Pack, class Product>
__device__ void multiply(const float* a, const float* b, float* d, Pack pack, Product product) {
  constexpr int kEach = kDepth / 8;  // elements in a register
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t left[4], right[2];
  float sum[4] = {};
  for (int i = 0; i < 4; ++i) {
    left[i] = pack(a + (g + i % 2 * 8) * kDepth + i / 2 * 4 * kEach + t * kEach, 1);
  }
  for (int i = 0; i < 2; ++i) right[i] = pack(b + (i * 4 * kEach + t * kEach) * 8 + g, 8);
  product(sum, left, right);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

__global__ void mma_kernel(Scalar type, const float* a, const float* b, float* d) {
  if (type == Scalar::kFloat32) {
    multiply<8>(
        a, b, d, [](const float* p, int) { return to_tf32(*p); },
        [](auto& sum, const auto& left, const auto& right) { mma_tf32(sum, left, right); });
  } else if (type == Scalar::kBFloat16) {
    const auto pack = [](const float* p, int step) {
      return __float2bfloat16_rn(p[0]).bits |
             static_cast<uint32_t>(__float2bfloat16_rn(p[step]).bits) << 16;
    };
    multiply<16>(a, b, d, pack, [](auto& sum, const auto& left, const auto& right) {
      mma_bf16(sum, left, right);
    });
  } else {
    const auto pack = [](const float* p, int step) {
      return __float2half_rn(p[0]).bits | static_cast<uint32_t>(__float2half_rn(p[step]).bits)
                                              << 16;
    };
    multiply<16>(a, b, d, pack,
                 [](auto& sum, const auto& left, const auto& right) { mma_f16(sum, left, right); });
  }
}

// Sums 1 for each thread, with one mistake or none.
enum class Mistake { kNone, kReturn, kOtherLine, kLane, kMemory, kAlignment, kCopy };

__global__ void faulty_kernel(Mistake mistake, const float4* ones, unsigned* counter, float* sums,
                              float* total) {
  float4* shared = reinterpret_cast<float4*>(shared_memory());
  const unsigned rank = threadIdx.x;
  copy_16(reinterpret_cast<uint4*>(&shared[rank]), &ones[rank], true);
  end_group();
  if (mistake == Mistake::kCopy && rank == 5) return;
  wait_for_groups<0>();
  if (mistake == Mistake::kReturn && rank == 5) return;
  if (mistake == Mistake::kMemory) shared[blockDim.x].x = 0;
  if (mistake == Mistake::kAlignment) load_16(&sums[1]);
  if (mistake == Mistake::kOtherLine && rank < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  float sum = shared[(rank + 32) % blockDim.x].x;
  for (int step = 16; step > 0 && !(mistake == Mistake::kLane && rank == 0); step /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, step);
  }
  __syncthreads();
  shared[rank].x = sum;
  __syncthreads();
  if (rank != 0) return;
  sums[blockIdx.x] = shared[0].x + shared[32].x;
  __threadfence();
  if (take_ticket(counter) != gridDim.x - 1) return;
  __threadfence();
  *total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) *total += load_fresh(&sums[b]);
}

std::string error;

template <class Run>
const char* report(Run run) {
  try {
    run();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

// Memory of exactly this size, so that the address sanitizer sees a step beyond it.
std::unique_ptr<unsigned char[]> memory(int64_t bytes, int fill) {
  std::unique_ptr<unsigned char[]> result(new unsigned char[static_cast<size_t>(bytes)]);
  std::memset(result.get(), fill, static_cast<size_t>(bytes));
  return result;
}

}  // namespace

namespace {

template <class Kernel, class Params>
void launch_small(Kernel kernel, int64_t blocks, int threads, int64_t seed, const Params& p) {
  emulator::Options options{};
  options.seed = static_cast<decltype(options.seed)>(seed);
  emulator::launch(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0,
                   options, p);
}

}  // namespace

extern "C" {

const char* run_mma(int64_t type, const float* a, const float* b, float* d) {
  return report(
      [&] { emulator::launch(mma_kernel, 1, 32, 0, {}, static_cast<Scalar>(type), a, b, d); });
}

const char* run_faulty(int64_t mistake, int64_t seed, int64_t resident, float* total) {
  return report([&] {
    constexpr unsigned kBlocks = 8, kThreads = 64;
    unsigned counter = 0;
    alignas(16) float sums[kBlocks];
    const std::vector<float4> ones(kThreads, float4{1, 1, 1, 1});
    emulator::launch(faulty_kernel, kBlocks, kThreads, kThreads * sizeof(float4),
                     {static_cast<uint64_t>(seed), static_cast<unsigned>(resident)},
                     static_cast<Mistake>(mistake), ones.data(), &counter, sums, total);
  });
}

// All pointers are NumPy's or torch's; the test has the same structure.
struct GramCase {
  const Block* blocks;
  int64_t block_count;
  const Piece* pieces;
  int64_t piece_count;
  const Share* shares;
  const Target* targets;
  int64_t target_count;
  int64_t samples, element_type, gram_type, precision, shared_limit;
  void* grams;
  double* eigenvalues;
  int64_t seed, resident;
};

const char* run_gram(const GramCase* c) {
  return report([&] {
    GramLaunch launch{};
    launch.element_type = static_cast<Scalar>(c->element_type);
    launch.gram_type = static_cast<Scalar>(c->gram_type);
    launch.precision = static_cast<Precision>(c->precision);
    launch.grams = c->grams;
    launch.eigenvalues = c->eigenvalues;
    const bool solves = std::any_of(c->targets, c->targets + c->target_count,
                                    [](const Target& t) { return t.row >= 0; });
    launch.basis =
        solves ? chip_basis(launch.gram_type, c->samples, c->shared_limit) : Basis::kNone;

    const Work work = plan_work(c->samples, c->pieces, c->shares, c->targets, c->target_count);
    const TableLayout layout = table_layout(work, c->block_count, c->piece_count);
    const auto tables = memory(layout.bytes, 0xff);
    write_tables(work, layout, c->blocks, c->block_count, c->pieces, c->piece_count, c->targets,
                 tables.get());
    point_at_tables(launch, work, layout, tables.get());
    const auto before = memory(layout.bytes, 0);
    std::memcpy(before.get(), tables.get(), static_cast<size_t>(layout.bytes));
    const auto partials =
        memory(partial_bytes(work, sums_in_double(launch.element_type, launch.gram_type)), 0xff);
    launch.partials = partials.get();

    emulator::launch(gram_kernel_for(launch), static_cast<unsigned>(launch.item_count),
                     kGramThreads, static_cast<size_t>(gram_shared_bytes(launch)),
                     {static_cast<uint64_t>(c->seed), static_cast<unsigned>(c->resident)}, launch);
    if (std::memcmp(before.get(), tables.get(), static_cast<size_t>(layout.bytes)) != 0) {
      throw emulator::Error("the launch left its tables or counters changed");
    }
  });
}

// As cuda/spectrum.cu launches them: `shared_limit` decides between shared and global memory.
const char* run_spectrum(const SpectrumParams* given, int64_t shared_limit) {
  return report([&] {
    const Basis basis = chip_basis(given->gram_type, given->samples, shared_limit);
    const auto run = [&](auto scalar) {
      using T = decltype(scalar);
      const int64_t n = given->samples;
      const auto workspace = memory(
          given->workers * lanczos_workspace(n) * static_cast<int64_t>(sizeof(double)), 0xff);
      SpectrumParams p = *given;
      p.workspace = reinterpret_cast<double*>(workspace.get());
      const unsigned blocks = static_cast<unsigned>(std::min(p.workers, p.count));
      if (basis == Basis::kNone) {
        const unsigned threads = static_cast<unsigned>(
            std::clamp<int64_t>((n + 31) / 32 * 32, kChipThreads, kMaxThreads));
        emulator::launch(spectrum_kernel<T>, blocks, threads, kTeamBytes, {.resident = 2}, p);
      } else {
        const size_t bytes = static_cast<size_t>(chip_bytes(p.gram_type, n, basis));
        emulator::launch(chip_spectrum_kernel<T>, blocks, kChipThreads, bytes, {.resident = 2}, p,
                         basis);
      }
    };
    if (given->gram_type == Scalar::kFloat64) {
      run(double{});
    } else {
      run(float{});
    }
  });
}

// What plan_work made of the tables: items [first, elements, piece, block, tile, group],
// groups [first, last, cell, share], cells [first, last, target, tile], and how many there are.
const char* run_plan(int64_t samples, const Piece* pieces, const Share* shares,
                     const Target* targets, int64_t target_count, int64_t room, int64_t* items,
                     int64_t* groups, int64_t* cells, int64_t* counts) {
  return report([&] {
    const Work work = plan_work(samples, pieces, shares, targets, target_count);
    counts[0] = static_cast<int64_t>(work.items.size());
    counts[1] = static_cast<int64_t>(work.groups.size());
    counts[2] = static_cast<int64_t>(work.cells.size());
    if (std::max({counts[0], counts[1], counts[2]}) > room) throw emulator::Error("no room");
    for (const Item& i : work.items) {
      for (int64_t x : {i.first, int64_t{i.elements}, int64_t{i.piece}, int64_t{i.block},
                        int64_t{i.tile}, int64_t{i.group}}) {
        *items++ = x;
      }
    }
    for (const Group& g : work.groups) {
      for (int64_t x : {g.first, g.last, g.cell, g.share}) *groups++ = x;
    }
    for (const Cell& c : work.cells) {
      for (int64_t x : {c.first, c.last, c.target, c.tile}) *cells++ = x;
    }
  });
}

// Offsets of an item's elements in its block: of every position, of every `next` one, and in steps
// of `step` elements.
const char* run_walk(const Block* block, const Piece* piece, int64_t first, int64_t elements,
                     int64_t step, int64_t* at, int64_t* next, int64_t* stepped) {
  return report([&] {
    const Item item{first, static_cast<int32_t>(elements), 0, 0, 0, 0};
    const Walk walk(*block, *piece, item);
    const Stride stride = walk.stride(static_cast<int>(step));
    Position neighbour = walk.at(0);
    for (int64_t e = 0; e < elements; ++e, walk.next(neighbour)) {
      at[e] = walk.offset(walk.at(static_cast<int>(e)));
      next[e] = walk.offset(neighbour);
    }
    for (int64_t start = 0; start < step; ++start) {
      const Position position = walk.at(static_cast<int>(start));
      int64_t offset = walk.offset(position);
      int column = position.column;
      for (int64_t e = start; e < elements; e += step) {
        stepped[e] = offset;
        offset += walk.step(column, stride);
      }
    }
  });
}

// Row and column in the Gram of every element of a tile's partial Gram.
const char* run_places(int64_t samples, int64_t tile, int64_t* rows, int64_t* columns) {
  return report([&] {
    const Tile where = tile_at(samples, static_cast<int>(tile));
    const int fragments =
        where.diagonal ? square_fragments(tile_samples(samples)) : side_fragments();
    for (int i = 0; i < fragments * kFragment; ++i) {
      const Place place = fragment_place(where.diagonal, i);
      rows[i] = where.row + place.row;
      columns[i] = where.column + place.column;
    }
  });
}

// The ghost way's kernels and the one for embeddings: parameters as csrc/ has them.
const char* run_ghost(const GhostParams* p, int64_t seed) {
  return report([&] {
    const auto kernel = p->type == Scalar::kFloat64 ? ghost_kernel<double> : ghost_kernel<float>;
    launch_small(kernel, ghost_blocks(*p), kGhostThreads, seed, *p);
  });
}

const char* run_patches(const PatchParams* p, int64_t seed) {
  return report([&] {
    const auto kernel = p->type == Scalar::kFloat64 ? patch_kernel<double> : patch_kernel<float>;
    launch_small(kernel, patch_blocks(*p), kGhostThreads, seed, *p);
  });
}

const char* run_rows(const RowsParams* p, int64_t seed) {
  return report([&] {
    const auto kernel = p->type == Scalar::kFloat64 ? rows_kernel<double> : rows_kernel<float>;
    launch_small(kernel, rows_blocks(*p), kRowsThreads, seed, *p);
  });
}

}  // extern "C"

}  // namespace lightning_mat
