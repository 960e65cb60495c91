// What the CUDA kernels of csrc/cuda need to compile and run on the host, for tests: a C++ compiler builds them.
//
// Clusters of blocks run one after another, a cluster's threads as fibers (fibers.h). The order in which all take turns
// is CUDA_ON_HOST_ORDER: 0 forward, 1 reversed, else the seed of a shuffle. A barrier that not all threads reach ends the
// launch with status 1 and a line that says so. cluster.h has what only sm_90 has.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <iterator>
#include <memory>
#include <numeric>
#include <random>

#include "fibers.h"

// The static key is one a declaration, as a static __shared__ array is.
#define SHARED_ARRAY(type, name, size) \
  static const char name##_key = 0;    \
  type* const name = static_cast<type*>(cuda_on_host::shared_array(&name##_key, (size) * sizeof(type)))

#undef __launch_bounds__
#define __launch_bounds__(...)

inline dim3 gridDim;

inline void __syncthreads() { cuda_on_host::barrier(cuda_on_host::AT_BLOCK_BARRIER); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

namespace cuda_on_host {

inline std::vector<int> turns(int count, int order) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == 1) std::reverse(numbers.begin(), numbers.end());
  if (order > 1) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(order));
  return numbers;
}

}  // namespace cuda_on_host

// Blocks of a grid, those of a cluster side by side in x.
template <typename... Parameters, typename... Arguments>
int launch_grid(void (*kernel)(Parameters...), dim3 grid, int blocks, Arguments... arguments) {
  using namespace cuda_on_host;
  const char* chosen = std::getenv("CUDA_ON_HOST_ORDER");
  const int order = chosen ? std::atoi(chosen) : 0;
  auto run = [&] { kernel(arguments...); };
  call = [](const void* f) { (*static_cast<const decltype(run)*>(f))(); };
  body = &run;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.x % blocks || blocks > CLUSTER) return 9;  // cudaErrorInvalidConfiguration
  gridDim = grid;
  of_cluster = blocks;
  ON_TSAN(scheduler.tsan_fiber = __tsan_get_current_fiber();)
  static std::vector<std::unique_ptr<Block>> spare;
  std::vector<std::unique_ptr<Block>> used;  // ThreadSanitizer: memory used twice would tie two clusters together
  bool complete = true;
  for (unsigned i : turns(grid.x * grid.y / blocks, order)) {
    ON_TSAN(std::move(spare.begin(), spare.end(), std::back_inserter(used)); spare.clear();)
    while (static_cast<int>(spare.size()) < blocks) spare.emplace_back(new Block);
    for (int j = 0; j < blocks; ++j) cluster[j] = spare[j].get();
    for (int j = 0; j < blocks; ++j) {
      const unsigned at = i * blocks + j;
      start_block(cluster[j], {at % grid.x, at / grid.x, 0});
    }
    complete = complete && run_cluster(turns(blocks, order), turns(THREADS, order));
  }
  ON_TSAN(__tsan_acquire(&launch_end);)
  if (!complete) std::fprintf(stderr, "cuda_on_host: a thread waits at a barrier that not all threads reach\n");
  return complete ? 0 : 1;
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, void*, Arguments... arguments) {
  return launch_grid(kernel, grid, 1, arguments...);
}

// c += a b with fragments as PTX lays out those of mma.m16n8k16: lane 4 g + t holds of a the rows g, g + 8 and the
// columns 2t, 2t + 1, 2t + 8, 2t + 9; of b these as rows of the column g; of c the rows g, g + 8 and the columns 2t,
// 2t + 1. A lane publishes its fragments and computes its own outputs.
template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using namespace cuda_on_host;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  auto& lanes = block->fragments[warp][block->threads[threadIdx.x].barriers[AT_WARP_BARRIER] % 2];
  std::copy(a, a + 4, lanes[lane]);
  std::copy(b, b + 2, lanes[lane] + 4);
  barrier(AT_WARP_BARRIER);
  const auto element = [&](int of_lane, int reg, int half) {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(&lanes[of_lane][reg]) + 2 * half, 2);
    return static_cast<float>(value);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float x = element(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2);
      c[i] += x * element(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
  }
}

#include "cluster.h"
