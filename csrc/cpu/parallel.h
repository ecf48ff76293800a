// Rows dealt to threads. Threads live for one call: nothing to be left behind by fork, nothing that competes with
// PyTorch's own pool while it idles. Starting one takes about 20 us, so small inputs are done by the caller alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace grpo::cpu {

constexpr int64_t kBytesAThread = 1 << 19;  // read in about 30 us
constexpr int64_t kBytesAChunk = 1 << 18;

// Calls work(first, last) until all rows are done, each by one thread. Chunks are taken as threads become free: ignored
// rows cost next to nothing and come in runs.
template <class Work>
void for_rows(int64_t num_rows, int64_t row_bytes, int64_t num_threads, Work work) {
  row_bytes = std::max<int64_t>(1, row_bytes);
  const int64_t useful = std::min(num_rows, num_rows * row_bytes / kBytesAThread);
  num_threads = std::min(num_threads, useful);
  if (num_threads <= 1) return work(0, num_rows);
  const int64_t fair = num_rows / (4 * num_threads);  // at least 4 chunks a thread
  const int64_t chunk = std::max<int64_t>(1, std::min(fair, kBytesAChunk / row_bytes));
  std::atomic<int64_t> next{0};
  const auto take_chunks = [&] {
    for (int64_t first; (first = next.fetch_add(chunk)) < num_rows;) work(first, std::min(first + chunk, num_rows));
  };
  std::vector<std::thread> helpers;
  helpers.reserve(num_threads - 1);
  try {
    while (int64_t(helpers.size()) < num_threads - 1) helpers.emplace_back(take_chunks);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that there are do the work.
  }
  take_chunks();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace grpo::cpu
