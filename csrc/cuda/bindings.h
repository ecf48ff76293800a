// grpo_kernels._C.cuda: raw pointers, sizes and strides in tuples, all arguments positional. grpo_kernels/kernels/cuda.py
// checks tensors and packs the tuples in the order of these functions. Included by ../bindings.cpp, and by the simulator.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "launches.h"

namespace grpo::cuda {

template <size_t N>
using Numbers = std::array<int64_t, N>;

inline void* pointer(int64_t address) { return reinterpret_cast<void*>(address); }

// Raises ValueError naming the argument and what it was.
inline int64_t checked(bool good, const char* name, const char* must, int64_t value) {
  if (!good) throw std::invalid_argument(std::string(name) + " must " + must + ", got " + std::to_string(value));
  return value;
}

inline Dtype dtype_named(const std::string& dtype) {
  if (dtype == "float32") return Dtype::float32;
  if (dtype == "bfloat16") return Dtype::bfloat16;
  if (dtype == "float16") return Dtype::float16;
  if (dtype == "float64") return Dtype::float64;
  throw std::invalid_argument("dtype must be float32, bfloat16, float16 or float64, got '" + dtype + "'");
}

inline PairLoss loss_named(const std::string& type) {
  if (type == "sigmoid") return PairLoss::sigmoid;
  if (type == "ipo") return PairLoss::ipo;
  if (type == "hinge") return PairLoss::hinge;
  if (type == "robust") return PairLoss::robust;
  throw std::invalid_argument("loss_type must be sigmoid, ipo, hinge or robust, got '" + type + "'");
}

inline Update update_named(const std::string& update) {
  if (update == "inline") return Update::inline_;
  if (update == "lagged") return Update::lagged;
  if (update == "none") return Update::none;
  throw std::invalid_argument("update must be inline, lagged or none, got '" + update + "'");
}

// (address, bytes of an element); address 0 where there is nothing
inline Integers integers(const Numbers<2>& x) {
  checked(x[0] == 0 || x[1] == 4 || x[1] == 8, "bytes of an integer", "be 4 or 8", x[1]);
  return {pointer(x[0]), x[1]};
}

inline Reals reals(const Numbers<2>& x) {
  checked(x[0] == 0 || x[1] == 4 || x[1] == 8, "bytes of a number", "be 4 or 8", x[1]);
  return {pointer(x[0]), x[1]};
}

// (address, sequence stride, position stride, vocabulary stride)
inline Matrix matrix(const Numbers<4>& x) { return {pointer(x[0]), x[1], x[2], x[3]}; }

// sizes: (rows, positions, vocabulary, splits, ignore_index); results: (token_logps, lse, partial)
inline Rows rows_of(const Numbers<5>& sizes, const Numbers<4>& logits, const Numbers<2>& labels,
                    const Numbers<3>& results) {
  checked(sizes[0] >= 0, "rows", "be at least 0", sizes[0]);
  checked(sizes[0] == 0 || sizes[1] >= 1, "positions", "be at least 1", sizes[1]);
  checked(sizes[2] >= 0 && sizes[2] < (int64_t(1) << 30), "vocab_size", "be in [0, 2^30)", sizes[2]);
  checked(sizes[3] >= 1 && sizes[3] <= 65535, "splits", "be in [1, 65535]", sizes[3]);
  return {sizes[0], sizes[1], int(sizes[2]), matrix(logits), integers(labels), sizes[4], pointer(results[0]),
          pointer(results[1]), sizes[3], pointer(results[2])};
}

inline Place place_of(const std::pair<int, uintptr_t>& place) { return {place.first, place.second}; }

inline void define_launches(pybind11::module_ m) {
  using OnDevice = std::pair<int, uintptr_t>;  // (device, stream)

  m.def("logps_forward", [](OnDevice place, const std::string& dtype, Numbers<5> sizes, Numbers<4> logits,
                            Numbers<2> labels, Numbers<3> results) {
    logps_forward(place_of(place), dtype_named(dtype), rows_of(sizes, logits, labels, results));
  });

  // scale: (dtoken_logps, sequence stride, position stride)
  m.def("logps_backward", [](OnDevice place, const std::string& dtype, Numbers<5> sizes, Numbers<4> logits,
                             Numbers<2> labels, int64_t lse, Numbers<3> scale, Numbers<2> factor, int64_t row_sequence,
                             Numbers<4> out) {
    const Gradient gradient{pointer(scale[0]), scale[1],
                            scale[2],          reals(factor),
                            static_cast<const int32_t*>(pointer(row_sequence)), matrix(out)};
    logps_backward(place_of(place), dtype_named(dtype), rows_of(sizes, logits, labels, {0, lse, 0}), gradient);
  });

  // tables: (row_sequence, tickets, logps, sequences, pairs, groups, counts, loss)
  // given: ref_logps, betas, margin, weights
  // state: (log_alpha, group_sizes, pending_sums, pending_counts, skipped_updates)
  // numbers: beta, label_smoothing, step_size, adjustment, floor, chi, gradient_scale
  // names: loss_type, estimator, update; flags: average; stages: rows, clear, pairs, alpha
  m.def("group_robust_forward", [](OnDevice place, const std::string& dtype, Numbers<5> sizes, Numbers<4> logits,
                                   Numbers<2> labels, Numbers<3> results, Numbers<2> cu_seqlens, Numbers<2> extents,
                                   Numbers<8> tables, Numbers<2> group_ids, std::array<Numbers<2>, 4> given,
                                   Numbers<5> state, std::array<double, 7> numbers,
                                   const std::array<std::string, 3>& names, bool average, std::array<bool, 4> stages) {
    const auto [num_sequences, num_groups] = extents;
    checked(num_sequences >= 0 && num_sequences % 2 == 0, "num_sequences", "be even and at least 0", num_sequences);
    checked(num_groups >= 1, "num_groups", "be at least 1", num_groups);
    if (names[1] != "importance" && names[1] != "group_mean")
      throw std::invalid_argument("estimator must be importance or group_mean, got '" + names[1] + "'");
    const GroupRule<double> rule{num_groups,
                                 names[1] == "importance" ? Estimator::importance : Estimator::group_mean,
                                 numbers[2], numbers[3], numbers[4], numbers[5],
                                 static_cast<const int64_t*>(pointer(state[1]))};
    if (rule.group_sizes == nullptr && (rule.estimator == Estimator::importance || rule.adjustment != 0))
      throw std::invalid_argument("group_sizes must be given with importance or an adjustment");
    Loss loss{};
    loss.num_sequences = num_sequences;
    loss.cu_seqlens = integers(cu_seqlens);
    loss.row_sequence = static_cast<int32_t*>(pointer(tables[0]));
    loss.tickets = static_cast<unsigned int*>(pointer(tables[1]));
    loss.logps = static_cast<double*>(pointer(tables[2]));
    loss.sequences = pointer(tables[3]);
    loss.pairs = pointer(tables[4]);
    loss.groups = static_cast<double*>(pointer(tables[5]));
    loss.counts = static_cast<int64_t*>(pointer(tables[6]));
    loss.loss = pointer(tables[7]);
    loss.group_ids = integers(group_ids);
    loss.ref_logps = reals(given[0]);
    loss.betas = reals(given[1]);
    loss.margin = reals(given[2]);
    loss.weights = reals(given[3]);
    loss.beta = numbers[0];
    loss.label_smoothing = numbers[1];
    loss.type = loss_named(names[0]);
    loss.average = average;
    loss.rule = rule;
    loss.update = update_named(names[2]);
    loss.gradient_scale = numbers[6];
    loss.log_alpha = static_cast<double*>(pointer(state[0]));
    loss.pending_sums = static_cast<double*>(pointer(state[2]));
    loss.pending_counts = static_cast<int64_t*>(pointer(state[3]));
    loss.skipped_updates = static_cast<int64_t*>(pointer(state[4]));
    loss.clear = stages[1];
    loss.do_pairs = stages[2];
    loss.do_alpha = stages[3];
    if (stages[0]) {
      group_robust_forward(place_of(place), dtype_named(dtype), rows_of(sizes, logits, labels, results), loss);
    } else {
      group_robust_finish(place_of(place), dtype_named(dtype), loss);
    }
  });
}

}  // namespace grpo::cuda
