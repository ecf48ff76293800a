// The kernels of csrc/cuda on the simulator, under the names that grpo_kernels._C.cuda has.
#include "cuda_runtime.h"

#include "../../csrc/cuda/bindings.h"

PYBIND11_MODULE(_simulated, m) {
  grpo::cuda::define_launches(m);
  m.def("seed", [](unsigned seed) { simulator::random.seed(seed); });
  // take(kernel, grid, threads, parameters) in place of the simulator; None for the simulator again.
  m.def("hand_launches_to", [](const pybind11::object& take) {
    if (take.is_none()) {
      simulator::instead = nullptr;
      return;
    }
    simulator::instead = [take](const char* name, dim3 grid, unsigned threads, const std::vector<std::string>& given) {
      pybind11::list parameters;
      for (const std::string& one : given) parameters.append(pybind11::bytes(one));
      take(name, pybind11::make_tuple(grid.x, grid.y, grid.z), threads, parameters);
    };
  });
  m.def("fail_next_launch", [] { next_error = 1; });
}
