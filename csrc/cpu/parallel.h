// Threads for the torch-free kernels: torch's own pool, reached through two functions that bindings.cpp defines.
#pragma once

#include <cstdint>
#include <memory>

namespace mfac::cpu {

using Task = void (*)(const void* context, int64_t index);

int num_threads();
// Runs task(context, i) once for each i < count. Inside a running task it runs serially on the calling thread.
void run_parallel(int64_t count, Task task, const void* context);

template <typename F>
void parallel_for(int64_t count, const F& f) {
  run_parallel(
      count, [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, std::addressof(f));
}

}  // namespace mfac::cpu
