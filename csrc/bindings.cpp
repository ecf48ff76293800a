// grpo_kernels._C: raw pointers, sizes and strides, all arguments positional (keywords cost more than a small launch).
// grpo_kernels/kernels/native.py checks tensors; what is checked here is what would crash if it had an error.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/group_weights.h"
#include "common/math.h"
#include "common/max_sum.h"
#include "common/pair_losses.h"
#include "cpu/instruction_sets.h"
#include "cpu/parallel.h"

#if defined(GRPO_CUDA)
#include "cuda/bindings.h"
#endif

#if !defined(GRPO_BUILD_FLAGS)
#define GRPO_BUILD_FLAGS ""
#endif

// Raises ValueError naming the argument and what it was.
#define GRPO_CHECK(condition, argument, must) \
  if (!(condition)) throw std::invalid_argument(#argument " must " must ", got " + text_of(argument))

namespace {

using namespace grpo;

std::string text_of(int64_t x) { return std::to_string(x); }
std::string text_of(const std::string& x) { return "'" + x + "'"; }

using Strides2 = std::tuple<int64_t, int64_t>;
using Strides3 = std::tuple<int64_t, int64_t, int64_t>;
using Shape3 = std::tuple<int64_t, int64_t, int64_t>;

// ---- the row kernels --------------------------------------------------------------------------------------------------

const cpu::RowKernels& kernels_of(const std::string& instruction_set) {
  static const std::vector<const cpu::RowKernels*> usable = cpu::usable_kernels();
  for (const cpu::RowKernels* kernels : usable)
    if (instruction_set == kernels->name) return *kernels;
  GRPO_CHECK(false, instruction_set, "be one of instruction_sets()");
  return *usable.back();
}

cpu::Dtype dtype_of(const std::string& dtype) {
  if (dtype == "float32") return cpu::Dtype::float32;
  if (dtype == "bfloat16") return cpu::Dtype::bfloat16;
  if (dtype == "float16") return cpu::Dtype::float16;
  if (dtype == "float64") return cpu::Dtype::float64;
  GRPO_CHECK(false, dtype, "be float32, bfloat16, float16 or float64");
  return cpu::Dtype::float32;
}

int64_t bytes_of(cpu::Dtype dtype) {
  switch (dtype) {
    case cpu::Dtype::float64:
      return 8;
    case cpu::Dtype::float32:
      return 4;
    case cpu::Dtype::bfloat16:
    case cpu::Dtype::float16:
      return 2;
  }
  throw std::logic_error("bytes_of: a dtype without a size");
}

char* pointer(uintptr_t address) { return reinterpret_cast<char*>(address); }

cpu::Layout layout_of(const Strides2& strides) { return {std::get<0>(strides), std::get<1>(strides)}; }

cpu::Logits logits_of(uintptr_t address, const Strides3& strides) {
  return {pointer(address), {std::get<0>(strides), std::get<1>(strides)}, std::get<2>(strides)};
}

cpu::Shape shape_of(const Shape3& shape) {
  const auto [sequences, positions, vocab_size] = shape;
  GRPO_CHECK(sequences >= 0, sequences, "be at least 0");
  GRPO_CHECK(positions >= 0, positions, "be at least 0");
  GRPO_CHECK(vocab_size >= 0, vocab_size, "be at least 0");
  return {sequences, positions, vocab_size};
}

cpu::Labels labels_of(uintptr_t address, int64_t label_bytes, const Strides2& strides, int64_t ignore_index) {
  GRPO_CHECK(label_bytes == 4 || label_bytes == 8, label_bytes, "be 4 or 8");
  return {pointer(address), int(label_bytes), layout_of(strides), ignore_index};
}

void token_logps_forward(const std::string& instruction_set, const std::string& dtype, const Shape3& shape,
                         uintptr_t logits, const Strides3& logits_strides, uintptr_t labels, int64_t label_bytes,
                         const Strides2& labels_strides, int64_t ignore_index, uintptr_t token_logps, uintptr_t lse,
                         int64_t num_threads) {
  const cpu::RowKernels& kernels = kernels_of(instruction_set);
  const cpu::Dtype type = dtype_of(dtype);
  const cpu::Forward f{shape_of(shape),
                       logits_of(logits, logits_strides),
                       labels_of(labels, label_bytes, labels_strides, ignore_index),
                       pointer(token_logps),
                       pointer(lse)};
  GRPO_CHECK(num_threads >= 1, num_threads, "be at least 1");
  const auto run = kernels.forward[int(type)];
  const pybind11::gil_scoped_release no_gil;
  cpu::for_rows(f.shape.sequences * f.shape.positions, f.shape.vocab_size * bytes_of(type), num_threads,
                [&](int64_t first, int64_t last) { run(f, first, last); });
}

void token_logps_backward(const std::string& instruction_set, const std::string& dtype, const Shape3& shape,
                          uintptr_t dtoken_logps, const Strides2& dtoken_logps_strides, uintptr_t logits,
                          const Strides3& logits_strides, uintptr_t labels, int64_t label_bytes,
                          const Strides2& labels_strides, uintptr_t lse, int64_t ignore_index, uintptr_t out,
                          const Strides3& out_strides, int64_t num_threads) {
  const cpu::RowKernels& kernels = kernels_of(instruction_set);
  const cpu::Dtype type = dtype_of(dtype);
  const cpu::Backward b{shape_of(shape),
                        logits_of(logits, logits_strides),
                        labels_of(labels, label_bytes, labels_strides, ignore_index),
                        pointer(dtoken_logps),
                        layout_of(dtoken_logps_strides),
                        pointer(lse),
                        logits_of(out, out_strides)};
  GRPO_CHECK(num_threads >= 1, num_threads, "be at least 1");
  const auto run = kernels.backward[int(type)];
  const pybind11::gil_scoped_release no_gil;
  cpu::for_rows(b.shape.sequences * b.shape.positions, b.shape.vocab_size * bytes_of(type), num_threads,
                [&](int64_t first, int64_t last) { run(b, first, last); });
}

// Both, of one chunk of rows after the other: what the backward reads again is in the cache. The gradients are written
// over the logits.
void token_logps_and_unit_gradient(const std::string& instruction_set, const std::string& dtype, const Shape3& shape,
                                   uintptr_t logits, const Strides3& logits_strides, uintptr_t labels,
                                   int64_t label_bytes, const Strides2& labels_strides, int64_t ignore_index,
                                   uintptr_t token_logps, uintptr_t lse, int64_t num_threads) {
  const cpu::RowKernels& kernels = kernels_of(instruction_set);
  const cpu::Dtype type = dtype_of(dtype);
  const float float_one = 1;
  const double double_one = 1;
  const char* one = reinterpret_cast<const char*>(&float_one);
  if (type == cpu::Dtype::float64) one = reinterpret_cast<const char*>(&double_one);
  const cpu::Forward f{shape_of(shape),
                       logits_of(logits, logits_strides),
                       labels_of(labels, label_bytes, labels_strides, ignore_index),
                       pointer(token_logps),
                       pointer(lse)};
  const cpu::Backward b{f.shape, f.logits, f.labels, one, {0, 0}, f.lse, f.logits};
  GRPO_CHECK(num_threads >= 1, num_threads, "be at least 1");
  const auto forward = kernels.forward[int(type)];
  const auto backward = kernels.backward[int(type)];
  const pybind11::gil_scoped_release no_gil;
  cpu::for_rows(f.shape.sequences * f.shape.positions, f.shape.vocab_size * bytes_of(type), num_threads,
                [&](int64_t first, int64_t last) {
                  forward(f, first, last);
                  backward(b, first, last);
                });
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const cpu::RowKernels* kernels : cpu::usable_kernels()) names.push_back(kernels->name);
  return names;
}

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = __VERSION__;  // begins with Clang
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["flags"] = GRPO_BUILD_FLAGS;
#if defined(__x86_64__)
  info["compiled"] = std::vector<std::string>{"avx512", "avx2", "baseline"};
#else
  info["compiled"] = std::vector<std::string>{"baseline"};
#endif
#if defined(GRPO_CUDA)
  info["cuda"] = GRPO_CUDA;  // nvcc's version and the architectures, as setup.py has it
#else
  info["cuda"] = pybind11::none();  // no CUDA kernels in this build
#endif
  return info;
}

// ---- the shared mathematics, for tests --------------------------------------------------------------------------------

PairLoss pair_loss_of(const std::string& loss_type) {
  if (loss_type == "sigmoid") return PairLoss::sigmoid;
  if (loss_type == "ipo") return PairLoss::ipo;
  if (loss_type == "hinge") return PairLoss::hinge;
  if (loss_type == "robust") return PairLoss::robust;
  GRPO_CHECK(false, loss_type, "be sigmoid, ipo, hinge or robust");
  return PairLoss::sigmoid;
}

template <class T>
std::tuple<T, T> pair_loss_values(const std::string& loss_type, T h, T beta, T e) {
  const ValueAndSlope<T> loss = pair_loss(pair_loss_of(loss_type), h, beta, e);
  return {loss.value, loss.slope};
}

template <class T>
T log_sum_exp(const std::vector<std::vector<T>>& parts) {
  MaxSum<T> all;
  for (const std::vector<T>& part : parts) {
    MaxSum<T> one;
    for (const T x : part) one = merge(one, MaxSum<T>{x, T(1)});
    all = merge(all, one);
  }
  return all.log_sum_exp();
}

// (log_alpha after the step, group losses, weights in the loss, whether the batch was finite)
template <class T>
std::tuple<std::vector<T>, std::vector<T>, std::vector<T>, bool> move_alpha(
    std::vector<T> log_alpha, const std::vector<T>& loss_sums, const std::vector<int64_t>& counts,
    const std::vector<int64_t>& group_sizes, bool importance, T step_size, T adjustment, T floor, T chi) {
  const int64_t num_groups = log_alpha.size();
  const GroupRule<T> rule{num_groups, importance ? Estimator::importance : Estimator::group_mean,
                          step_size,  adjustment,
                          floor,      chi,
                          group_sizes.empty() ? nullptr : group_sizes.data()};
  const GroupStatistics<T> batch = statistics_of(rule, loss_sums.data(), counts.data());
  move_log_alpha(rule, batch, log_alpha.data());
  std::vector<T> losses, weights;
  for (int64_t g = 0; g < num_groups; ++g) {
    losses.push_back(group_loss(rule, batch, g));
    weights.push_back(loss_weight(rule, log_alpha[g]));
  }
  return {log_alpha, losses, weights, batch.finite};
}

void vector_exp(const std::string& instruction_set, uintptr_t x, uintptr_t out, int64_t n) {
  kernels_of(instruction_set)
      .exp(reinterpret_cast<const float*>(pointer(x)), reinterpret_cast<float*>(pointer(out)), n);
}

template <class T>
void define_mathematics(pybind11::module_ m, const std::string& suffix) {
  m.def(("softplus_" + suffix).c_str(), [](T x) { return softplus(x); });
  m.def(("log_sigmoid_" + suffix).c_str(), [](T x) { return log_sigmoid(x); });
  m.def(("sigmoid_" + suffix).c_str(), [](T x) { return sigmoid(x); });
  m.def(("log_add_exp_" + suffix).c_str(), [](T a, T b) { return log_add_exp(a, b); });
  m.def(("pair_loss_" + suffix).c_str(), &pair_loss_values<T>);
  m.def(("log_sum_exp_" + suffix).c_str(), &log_sum_exp<T>);
  m.def(("move_alpha_" + suffix).c_str(), &move_alpha<T>);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of grpo_kernels. Private: use grpo_kernels.kernels.native.";
  m.def("token_logps_forward", &token_logps_forward);
  m.def("token_logps_backward", &token_logps_backward);
  m.def("token_logps_and_unit_gradient", &token_logps_and_unit_gradient);
  m.def("instruction_sets", &instruction_sets, "Those that this machine can run, best first.");
  m.def("build_info", &build_info, "Compiler, flags and instruction sets of this build.");

#if defined(GRPO_CUDA)
  pybind11::module_ cuda = m.def_submodule("cuda", "Private: use grpo_kernels.kernels.cuda.");
  grpo::cuda::define_launches(cuda);
#endif

  pybind11::module_ testing = m.def_submodule("testing", "What csrc/common computes; for tests.");
  define_mathematics<float>(testing, "float32");
  define_mathematics<double>(testing, "float64");
  testing.def("vector_exp", &vector_exp);
}
