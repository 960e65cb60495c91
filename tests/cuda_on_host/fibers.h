// Blocks of CUDA threads as fibers on one thread of the host, and what the sanitizers are told of them.
//
// The blocks of a cluster run together, others one after another. A fiber runs up to its next barrier. Shared memory is
// NaN when a block starts, and to AddressSanitizer each array has exactly its size, from the moment when a thread of its
// block comes to its declaration until the block ends. To ThreadSanitizer barriers are all that orders two threads of a
// block or of a cluster, and nothing orders two clusters.
#pragma once

#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ON_ASAN(...) __VA_ARGS__
#else
#define ON_ASAN(...)
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define ON_TSAN(...) __VA_ARGS__
#else
#define ON_TSAN(...)
#endif
#define UNSEEN __attribute__((no_sanitize("thread"), noinline)) inline  // by ThreadSanitizer: what plays the hardware

inline uint3 threadIdx, blockIdx;

namespace cuda_on_host {

constexpr int THREADS = 128, WARP = 32, WARPS = THREADS / WARP;
constexpr int CLUSTER = 16;  // blocks at most
constexpr size_t SHARED_BYTES = 48 * 1024, REDZONE = 64, MAX_ARRAYS = 16, STACK_BYTES = 32 * 1024;
enum State { AT_WARP_BARRIER, AT_BLOCK_BARRIER, AT_CLUSTER_BARRIER, BARRIERS, RUNNABLE = BARRIERS, DONE };

struct Fiber {
  ucontext_t context;
  void *asan_fake_stack, *tsan_fiber;
  const void* stack;
  size_t stack_bytes;
};

// A copy that was started and not yet waited for.
struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Thread : Fiber {
  State state;
  int barriers[BARRIERS];  // passed so far, of each kind
  int groups;              // of copies, ended so far
  std::vector<Copy> copies;
  char own_stack[STACK_BYTES];
};

struct Block {
  alignas(16) unsigned char arena[SHARED_BYTES + MAX_ARRAYS * (REDZONE + 16)];
  struct { const void* key; void* data; } arrays[MAX_ARRAYS];
  size_t used, bytes;
  // Addresses on which ThreadSanitizer orders threads; the first block's of a cluster for all of it.
  uint64_t cluster_barrier[2], block_barrier[2], warp_barrier[WARPS][2];
  uint32_t fragments[WARPS][2][WARP][6];     // what lanes hand to a product, two products at a time
  const void* rows[WARPS][2][WARP];          // of which lanes load matrices, two loads at a time
  Thread threads[THREADS];
  uint3 index;
};

inline Block* block;             // that runs
inline Block* cluster[CLUSTER];  // to which it belongs, of_cluster blocks
inline int of_cluster;
inline int current;  // its thread that runs
inline Fiber scheduler;
inline uint64_t launch_end;
inline void (*call)(const void*);  // runs a kernel's body
inline const void* body;

UNSEEN void* shared_array(const void* key, size_t bytes) {
  auto* array = block->arrays;
  while (array->key != nullptr && array->key != key) ++array;
  if (array->key == nullptr) {
    *array = {key, block->arena + block->used};
    block->used += (bytes + 15) / 16 * 16 + REDZONE;
    block->bytes += bytes;
    if (block->bytes > SHARED_BYTES || array == block->arrays + MAX_ARRAYS - 1) {
      std::fprintf(stderr, "cuda_on_host: more than 48 KiB of shared memory, or too many arrays\n");
      std::abort();
    }
    ON_ASAN(__asan_unpoison_memory_region(array->data, bytes);)
  }
  return array->data;
}

UNSEEN void switch_fibers(Fiber& from, Fiber& to, bool forever) {
  ON_ASAN(__sanitizer_start_switch_fiber(forever ? nullptr : &from.asan_fake_stack, to.stack, to.stack_bytes);)
  ON_TSAN(__tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);)
  swapcontext(&from.context, &to.context);
  ON_ASAN(__sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);)
  (void)forever;
}

UNSEEN void leave(State state) {  // to the scheduler, until it lets this thread go on
  Thread& self = block->threads[current];
  self.state = state;
  switch_fibers(self, scheduler, state == DONE);
}

UNSEEN void run_thread() {
  ON_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);)
  call(body);
  ON_TSAN(__tsan_release(&launch_end);)
  leave(DONE);
}

UNSEEN void barrier(State kind) {
  const int parity = block->threads[current].barriers[kind]++ % 2;
  uint64_t* const orders = kind == AT_CLUSTER_BARRIER ? cluster[0]->cluster_barrier
                           : kind == AT_BLOCK_BARRIER ? block->block_barrier
                                                      : block->warp_barrier[current / WARP];
  ON_TSAN(__tsan_release(orders + parity);)
  leave(kind);
  ON_TSAN(__tsan_acquire(orders + parity);)
  (void)orders, (void)parity;
}

UNSEEN bool release(Block* one, State kind, int first, int count) {  // those that wait, if all of them do
  Thread* threads = one->threads + first;
  const bool all = std::all_of(threads, threads + count, [=](const Thread& thread) { return thread.state == kind; });
  for (int i = 0; all && i < count; ++i) threads[i].state = RUNNABLE;
  return all;
}

UNSEEN bool release_cluster() {
  const auto waits = [](const Thread& thread) { return thread.state == AT_CLUSTER_BARRIER; };
  for (int i = 0; i < of_cluster; ++i)
    if (!std::all_of(cluster[i]->threads, cluster[i]->threads + THREADS, waits)) return false;
  for (int i = 0; i < of_cluster; ++i) release(cluster[i], AT_CLUSTER_BARRIER, 0, THREADS);
  return true;
}

UNSEEN void start_block(Block* one, uint3 index) {
  one->index = index;
  one->used = one->bytes = 0;
  std::memset(one->arrays, 0, sizeof one->arrays);
  ON_ASAN(__asan_unpoison_memory_region(one->arena, sizeof one->arena);)
  std::memset(one->arena, 0xff, sizeof one->arena);
  ON_ASAN(__asan_poison_memory_region(one->arena, sizeof one->arena);)
  for (Thread& thread : one->threads) {
    thread.state = RUNNABLE;
    std::fill_n(thread.barriers, BARRIERS, 0);
    thread.groups = 0;
    thread.copies.clear();
    getcontext(&thread.context);
    thread.stack = thread.context.uc_stack.ss_sp = thread.own_stack;
    thread.stack_bytes = thread.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&thread.context, run_thread, 0);
    ON_TSAN(thread.tsan_fiber = __tsan_create_fiber(0);)
  }
}

// Runs every thread of a block that can go on up to its next barrier; whether a barrier of the block then lets any go on.
UNSEEN bool run_block(Block* one, const std::vector<int>& order) {
  block = one;
  blockIdx = one->index;
  bool ended = true;
  for (int i : order) {
    if (one->threads[i].state == RUNNABLE) {
      threadIdx.x = current = i;
      switch_fibers(scheduler, one->threads[i], false);
    }
    ended = ended && one->threads[i].state == DONE;
  }
  // Nobody may write to the shared memory of a block that has ended.
  ON_ASAN(if (ended) __asan_poison_memory_region(one->arena, sizeof one->arena);)
  bool going = release(one, AT_BLOCK_BARRIER, 0, THREADS);
  for (int warp = 0; warp < WARPS; ++warp) going |= release(one, AT_WARP_BARRIER, warp * WARP, WARP);
  return going;
}

// Blocks that run together: in this order, each as far as it can go without the others, so that the first one to run
// finds that the others have not begun.
UNSEEN bool run_cluster(const std::vector<int>& blocks, const std::vector<int>& order) {
  do {
    for (int i : blocks)
      while (run_block(cluster[i], order)) {
      }
  } while (release_cluster());
  bool complete = true;
  for (int i = 0; i < of_cluster; ++i) {
    ON_TSAN(for (Thread& thread : cluster[i]->threads) __tsan_destroy_fiber(thread.tsan_fiber);)
    complete = complete && release(cluster[i], DONE, 0, THREADS);
  }
  return complete;
}

}  // namespace cuda_on_host
