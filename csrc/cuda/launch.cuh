// What every launcher does: the tensors' device is made current, the dtype becomes a type, the launch is checked.
#pragma once

#include <stdexcept>
#include <string>

#include "formats.cuh"
#include "launches.h"

namespace grpo::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                             ")");
}

inline void check_grid(int64_t x, const char* what) {
  if (x > kMaxGridX) throw std::runtime_error(std::string(what) + ": more than 2^31 - 1 blocks in one call");
}

class Current {
 public:
  explicit Current(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline cudaStream_t stream_of(Place place) { return reinterpret_cast<cudaStream_t>(place.stream); }

// Calls run(format) with the format of the dtype.
template <class Run>
void with_format(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::float32:
      return run(Float32{});
    case Dtype::bfloat16:
      return run(Bfloat16{});
    case Dtype::float16:
      return run(Float16{});
    case Dtype::float64:
      return run(Float64{});
  }
  throw std::logic_error("with_format: no such dtype");
}

}  // namespace grpo::cuda
