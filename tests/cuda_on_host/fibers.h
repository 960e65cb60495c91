// A block of CUDA threads as fibers on one thread of the host, and what the sanitizers are told of them.
//
// A fiber runs up to its next barrier. Shared memory is NaN when a block starts, and to AddressSanitizer each array has
// exactly its size. To ThreadSanitizer barriers are all that orders two threads of a block, and nothing orders two
// blocks.
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
constexpr size_t SHARED_BYTES = 48 * 1024, REDZONE = 64, MAX_ARRAYS = 16, STACK_BYTES = 32 * 1024;
enum State { RUNNABLE, AT_WARP_BARRIER, AT_BLOCK_BARRIER, DONE };

struct Fiber {
  ucontext_t context;
  void *asan_fake_stack, *tsan_fiber;
  const void* stack;
  size_t stack_bytes;
};

struct Thread : Fiber {
  State state;
  int barriers[2];  // passed so far: of its warp, of its block
  char own_stack[STACK_BYTES];
};

struct Block {
  alignas(16) unsigned char arena[SHARED_BYTES + MAX_ARRAYS * (REDZONE + 16)];
  struct { const void* key; void* data; } arrays[MAX_ARRAYS];
  size_t used, bytes;
  uint64_t block_barrier[2], warp_barrier[WARPS][2];  // addresses on which ThreadSanitizer orders threads
  uint32_t fragments[WARPS][2][WARP][6];              // what lanes hand to a product, two products at a time
  Thread threads[THREADS];
};

inline Block* block;  // that runs
inline int current;   // its thread that runs
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
  const bool of_block = kind == AT_BLOCK_BARRIER;
  const int parity = block->threads[current].barriers[of_block]++ % 2;
  uint64_t* const orders = of_block ? block->block_barrier : block->warp_barrier[current / WARP];
  ON_TSAN(__tsan_release(orders + parity);)
  leave(kind);
  ON_TSAN(__tsan_acquire(orders + parity);)
  (void)orders, (void)parity;
}

UNSEEN bool release(State kind, int first, int count) {  // those that wait, if all of them do
  Thread* threads = block->threads + first;
  const bool all = std::all_of(threads, threads + count, [=](const Thread& thread) { return thread.state == kind; });
  for (int i = 0; all && i < count; ++i) threads[i].state = RUNNABLE;
  return all;
}

UNSEEN void start_block() {
  block->used = block->bytes = 0;
  std::memset(block->arrays, 0, sizeof block->arrays);
  ON_ASAN(__asan_unpoison_memory_region(block->arena, sizeof block->arena);)
  std::memset(block->arena, 0xff, sizeof block->arena);
  ON_ASAN(__asan_poison_memory_region(block->arena, sizeof block->arena);)
  for (Thread& thread : block->threads) {
    thread.state = RUNNABLE;
    thread.barriers[0] = thread.barriers[1] = 0;
    getcontext(&thread.context);
    thread.stack = thread.context.uc_stack.ss_sp = thread.own_stack;
    thread.stack_bytes = thread.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&thread.context, run_thread, 0);
    ON_TSAN(thread.tsan_fiber = __tsan_create_fiber(0);)
  }
}

UNSEEN bool run_block(Block* one, uint3 index, const std::vector<int>& order) {
  block = one;
  blockIdx = index;
  start_block();
  for (bool going = true; going;) {
    for (int i : order) {
      if (block->threads[i].state != RUNNABLE) continue;
      threadIdx.x = current = i;
      switch_fibers(scheduler, block->threads[i], false);
    }
    going = release(AT_BLOCK_BARRIER, 0, THREADS);
    for (int warp = 0; warp < WARPS; ++warp) going |= release(AT_WARP_BARRIER, warp * WARP, WARP);
  }
  ON_TSAN(for (Thread& thread : block->threads) __tsan_destroy_fiber(thread.tsan_fiber);)
  return release(DONE, 0, THREADS);
}

}  // namespace cuda_on_host
