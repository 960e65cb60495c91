// What csrc/cuda/sm90.cuh declares, on the host: the blocks of a cluster run together (fibers.h).
#pragma once

inline void cluster_barrier() { cuda_on_host::barrier(cuda_on_host::AT_CLUSTER_BARRIER); }

// Every block hands its arrays out in the same order, so that they lie alike in each. To AddressSanitizer an array that
// the other block has not yet come to, or has left, is no memory.
template <typename T>
UNSEEN T* in_block(T* ptr, int rank) {
  using namespace cuda_on_host;
  const auto offset = reinterpret_cast<unsigned char*>(ptr) - block->arena;
  return reinterpret_cast<T*>(cluster[rank]->arena + offset);
}

namespace cuda_on_host {

inline void check_line(const void* ptr) {
  if (reinterpret_cast<uintptr_t>(ptr) % 16 == 0) return;
  std::fprintf(stderr, "cuda_on_host: misaligned address of 16 bytes\n");
  std::abort();
}

}  // namespace cuda_on_host

// A copy may happen at any time until it is waited for: from its start on the target is NaN, and then it is read.
inline void start_copy(void* to, const void* from, int bytes) {
  using namespace cuda_on_host;
  check_line(to), check_line(from);
  std::fill_n(static_cast<uint64_t*>(to), 2, ~uint64_t(0));
  Thread& thread = block->threads[current];
  thread.copies.push_back({to, from, bytes, thread.groups});
}
inline void end_group() { ++cuda_on_host::block->threads[cuda_on_host::current].groups; }
template <int N>
void wait_for_groups() {
  auto& thread = cuda_on_host::block->threads[cuda_on_host::current];
  std::vector<cuda_on_host::Copy> left;
  for (const auto& copy : thread.copies) {
    if (copy.group >= thread.groups - N) {
      left.push_back(copy);
      continue;
    }
    for (int i = 0; i < 8; ++i)  // one by one: ThreadSanitizer does not see a memcpy that the compiler expands
      static_cast<uint16_t*>(copy.to)[i] = 2 * i < copy.bytes ? static_cast<const uint16_t*>(copy.from)[i] : 0;
  }
  thread.copies.swap(left);
}

// Each lane publishes its row and reads its own elements of all four matrices.
template <bool TRANSPOSED>
void load_matrices(uint32_t (&to)[4], const void* row) {
  using namespace cuda_on_host;
  check_line(row);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  auto& rows = block->rows[warp][block->threads[threadIdx.x].barriers[AT_WARP_BARRIER] % 2];
  rows[lane] = row;
  barrier(AT_WARP_BARRIER);
  for (int j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e)
      pair[e] = static_cast<const uint16_t*>(rows[8 * j + (TRANSPOSED ? 2 * t + e : g)])[TRANSPOSED ? g : 2 * t + e];
    to[j] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

class SharedArrays {
 public:
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(cuda_on_host::shared_array(reinterpret_cast<const void*>(++taken_), count * sizeof(T)));
  }

 private:
  uintptr_t taken_ = 0;  // the arrays are known by their number
};

// The shared memory that a launch asks for must be what its blocks take.
template <typename... Parameters, typename... Arguments>
int launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int cluster, int threads, int64_t bytes, void*,
                    Arguments... arguments) {
  using namespace cuda_on_host;
  if (threads != THREADS) return 1;
  const int status = launch_grid(kernel, dim3(clusters * cluster), cluster, arguments...);
  if (status != 0 || static_cast<int64_t>(cuda_on_host::cluster[0]->bytes) == bytes) return status;
  std::fprintf(stderr, "cuda_on_host: %lld bytes of shared memory asked for, %lld taken\n", static_cast<long long>(bytes),
               static_cast<long long>(cuda_on_host::cluster[0]->bytes));
  return 1;
}
