// The two functions of parallel.h, by torch's thread pool. Included by one file of each extension.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace mfac::cpu {

int num_threads() { return at::get_num_threads(); }

// Dynamic scheduling, in 16 runs of neighbouring tasks per thread: on a shared machine one thread may be far slower
// than another.
void run_parallel(int64_t count, Task task, const void* context) {
  const int64_t threads = std::min<int64_t>(num_threads(), count), run = std::max<int64_t>(1, count / (threads * 16));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = next.fetch_add(run)) < count;)
      for (int64_t i = first; i < std::min(first + run, count); ++i) task(context, i);
  });
}

}  // namespace mfac::cpu
