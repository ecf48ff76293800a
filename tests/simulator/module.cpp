// The kernels of csrc/cuda on the simulator, under the names that grpo_kernels._C.cuda has.
#include "cuda_runtime.h"

#include "../../csrc/cuda/bindings.h"

PYBIND11_MODULE(_simulated, m) {
  grpo::cuda::define_launches(m);
  m.def("seed", [](unsigned seed) { simulator::random.seed(seed); });
  m.def("fail_next_launch", [] { next_error = 1; });
}
