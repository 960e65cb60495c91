// What sm_90 adds, as its kernels use it: clusters of blocks that write into each other's shared memory, copies from
// global to shared memory that pass through no register, and fragments of matrices in shared memory. The version for
// the host is tests/cuda_on_host/cluster.h.
#pragma once

#include "tiles.cuh"

#ifndef CUDA_ON_HOST
namespace {

// Waits for all threads of all blocks of the cluster; what they wrote before is then seen by all.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// What lies at ptr, an address in this block's shared memory, in that of another block of the cluster.
template <typename T>
__device__ T* in_block(T* ptr, int rank) {
  T* there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(ptr), "r"(rank));
  return there;
}

__device__ inline uint32_t shared_address(const void* ptr) { return static_cast<uint32_t>(__cvta_generic_to_shared(ptr)); }

// Starts to copy 16 bytes, both addresses aligned to 16: `bytes` of them from global memory, zeros for the others.
__device__ inline void start_copy(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
// The copies that this thread started since the last call are a group.
__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups of this thread are under way. Other threads see the copies after a barrier.
template <int N>
__device__ void wait_for_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four matrices of 8 x 8 elements of 16 bits; lane 8 j + i gives the address of row i of matrix j. Lane 4 g + t gets of
// each matrix row g, columns 2 t and 2 t + 1, or, where TRANSPOSED is set, column g, rows 2 t and 2 t + 1.
template <bool TRANSPOSED>
__device__ void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

// Hands out the shared memory that a launch asked for, array by array, each aligned to 16 bytes.
class SharedArrays {
 public:
  __device__ SharedArrays() {
    extern __shared__ __align__(16) unsigned char whole[];
    next_ = whole;
  }
  template <typename T>
  __device__ T* take(int64_t count) {
    T* const taken = reinterpret_cast<T*>(next_);
    next_ += cdiv(count * sizeof(T), 16) * 16;
    return taken;
  }

 private:
  unsigned char* next_;
};

// Launches clusters of `cluster` blocks, at most 16, with threads and bytes of shared memory for each block.
template <typename... Parameters, typename... Arguments>
int launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int cluster, int threads, int64_t bytes, void* stream,
                    Arguments... arguments) {
  auto* const function = reinterpret_cast<const void*>(kernel);
  int device, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess && major != 9) return static_cast<int>(cudaErrorNoKernelImageForDevice);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) status = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(clusters * cluster);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    status = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  cudaGetLastError();  // which the status says too
  return static_cast<int>(status);
}

}  // namespace
#endif
