// A block simulator: the .cu files of csrc/cuda compiled by g++ for the CPU. Threads of a block are fibers that run until
// they wait; a warp may run ahead of others; blocks run one after another in shuffled order. It finds missing and divergent
// barriers, wrong tickets, wrong offsets. It cannot find a missing memory fence.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simulator {

constexpr size_t kStack = 1 << 18;

struct Fiber {
  ucontext_t context;  // to start it; from then on jumps, which unlike swapcontext() ask nothing of the system
  jmp_buf place;
  bool started = false;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done = false;
  int waits_at = 0;  // line of the block's barrier; negative: of a shuffle
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline unsigned current = 0;
inline std::function<void()> body;
inline unsigned char exchanged[1024][32];
inline std::mt19937 random(1);

inline void run_fiber() {
  body();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

inline void wait_at(int line) {
  Fiber& mine = fibers[current];
  mine.waits_at = line;
  if (_setjmp(mine.place) == 0) _longjmp(scheduler, 1);
}

inline void resume(unsigned thread) {
  current = thread;
  threadIdx = dim3(thread);
  Fiber& next = fibers[thread];
  next.waits_at = 0;
  if (_setjmp(scheduler) != 0) return;
  if (next.started) _longjmp(next.place, 1);
  next.started = true;
  setcontext(&next.context);
}

// Lets a warp go on that waits together at a shuffle.
inline void release_warp(unsigned warp, std::vector<bool>& ready) {
  const int line = fibers[warp].waits_at;
  for (unsigned t = warp; t < warp + 32; ++t)
    if (fibers[t].done || line >= 0 || fibers[t].waits_at != line) return;
  for (unsigned t = warp; t < warp + 32; ++t) ready[t] = true;
}

// Lets the block go on if it waits together at one barrier.
inline bool release_block(std::vector<bool>& ready) {
  const int line = fibers[0].waits_at;
  for (const Fiber& fiber : fibers)
    if (fiber.done || line <= 0 || fiber.waits_at != line) return false;
  ready.assign(fibers.size(), true);
  return true;
}

inline void run_block(unsigned threads) {
  if (threads % 32 != 0) throw std::runtime_error("simulator: a block must have whole warps");
  fibers.resize(threads);
  std::vector<unsigned> order(32);
  std::iota(order.begin(), order.end(), 0u);
  for (Fiber& fiber : fibers) {
    fiber.done = fiber.started = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  std::vector<bool> ready(threads, true);
  unsigned warp = random() % (threads / 32) * 32;
  for (;;) {
    // One warp at a time, mostly the same: it runs ahead of the others as far as the barriers let it.
    std::vector<unsigned> warps;
    for (unsigned t = 0; t < threads; ++t)
      if (ready[t] && (warps.empty() || warps.back() != t / 32 * 32)) warps.push_back(t / 32 * 32);
    if (!warps.empty()) {
      const bool stays = random() % 16 != 0 && std::count(warps.begin(), warps.end(), warp);
      if (!stays) warp = warps[random() % warps.size()];
      std::shuffle(order.begin(), order.end(), random);
      for (const unsigned lane : order) {
        const unsigned thread = warp + lane;
        if (!ready[thread]) continue;
        ready[thread] = false;
        resume(thread);
      }
      release_warp(warp, ready);
      continue;
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; })) return;
    if (!release_block(ready)) {
      std::string lines;
      for (const Fiber& f : fibers) {
        const std::string line = f.done ? "ended" : std::to_string(std::abs(f.waits_at));
        if (lines.find(line) == std::string::npos) lines += " " + line;
      }
      throw std::runtime_error("simulator: divergent barriers: threads of a block wait at lines" + lines);
    }
  }
}

inline int64_t index_in(const dim3& grid, int64_t i) {
  blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
  return i;
}

// The compiler's text of a kernel with its template arguments.
template <auto Kernel>
const char* name_of() {
  return __PRETTY_FUNCTION__;
}

// Takes launches in place of the simulator, where it is set: the kernel, its grid and threads, the bytes of each parameter.
inline std::function<void(const char*, dim3, unsigned, const std::vector<std::string>&)> instead;

template <class T>
std::string bytes_of(const T& x) {
  return std::string(reinterpret_cast<const char*>(&x), sizeof x);
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            const std::decay_t<Parameters>&... arguments) {
  if (instead) return instead(name, grid, threads, {bytes_of(arguments)...});
  gridDim = grid;
  blockDim = dim3(threads);
  body = [&] { kernel(arguments...); };
  std::vector<int64_t> blocks(int64_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), int64_t(0));
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const int64_t block : blocks) {
    index_in(grid, block);
    run_block(threads);
  }
}

template <class T>
T exchange(T x, unsigned from_lane_mask, int line) {
  static_assert(sizeof(T) <= sizeof(exchanged[0]), "a shuffle of a wide type");
  const unsigned mine = current;
  std::memcpy(exchanged[mine], &x, sizeof x);
  wait_at(-line);
  T other;
  std::memcpy(&other, exchanged[mine ^ from_lane_mask], sizeof other);
  wait_at(-line - 100000);  // nobody writes again before all have read
  return other;
}

}  // namespace simulator

#define __syncthreads() simulator::wait_at(__LINE__)
#define __shfl_xor_sync(mask, x, distance) simulator::exchange(x, distance, __LINE__)
#define GRPO_LAUNCH(kernel, grid, threads, stream, ...) \
  ((void)(stream), simulator::launch(simulator::name_of<kernel>(), kernel, grid, threads, __VA_ARGS__))

inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}
inline float __expf(float x) { return std::exp(x); }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t next_error = cudaSuccess;  // tests set it
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = next_error;
  next_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error that a test asked for"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorSimulated"; }
