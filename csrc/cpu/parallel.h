// Threads for the torch-free kernels: torch's own pool, reached through two functions that bindings.h defines.
#pragma once

#include <cstdint>
#include <memory>

namespace mfac::cpu {

using Task = void (*)(const void* context, int64_t index);

int num_threads();
// Runs task(context, i) once for each i < count. Inside a running task it runs serially on the calling thread.
void run_parallel(int64_t count, Task task, const void* context);

// Calls f(i) for each i < count, in parallel if it pays: `cost` is the approximate number of multiply-adds of one call,
// and below some 100 microseconds of work waking the threads costs more than they save (on a busy machine, far more).
template <typename F>
void parallel_for(int64_t count, int64_t cost, const F& f) {
  constexpr int64_t kWorthwhile = 1 << 20;  // multiply-adds: about 100 microseconds of one core
  if (count <= 1 || count * cost < kWorthwhile) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  run_parallel(count, [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, std::addressof(f));
}

}  // namespace mfac::cpu
