// The CPU kernels as a plain shared library, without torch, for test_standalone.py: any instruction set, any sanitizer.
#include <atomic>
#include <stdexcept>
#include <thread>

#include "../csrc/cpu/block_factor.cpp"
#include "../csrc/cpu/group_saliency.cpp"
#include "../csrc/cpu/independent_update.cpp"
#include "../csrc/cpu/inverse_diagonal.cpp"
#include "../csrc/cpu/inverse_product.cpp"
#include "../csrc/cpu/joint_step.cpp"
#include "../csrc/cpu/quadratic_form.cpp"
#include "../csrc/cpu/select_smallest.cpp"

namespace mfac::cpu {

static int threads = 1;
static thread_local bool inside = false;
static int terms = 0;  // of float32 gradients in bfloat16 products

int num_threads() { return threads; }

void run_parallel(int64_t count, Task task, const void* context) {
  std::atomic<int64_t> next{0};
  const bool nested = inside;
  const auto work = [&] {
    inside = true;
    for (int64_t i; (i = next++) < count;) task(context, i);
    inside = nested;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads && !nested; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace mfac::cpu

using namespace mfac::cpu;

namespace {

template <typename F>
void dispatch(bool half, const void* data, int64_t m, int64_t d, double damping, int64_t block_size, const F& f) {
  block_size = std::min(block_size, d);
  if (half)
    f(Gradients<BFloat16>{static_cast<const BFloat16*>(data), m, d, d, damping, block_size, terms});
  else
    f(Gradients<float>{static_cast<const float*>(data), m, d, d, damping, block_size, terms});
}

}  // namespace

extern "C" {

void set_threads(int count) { threads = count; }
int vector_bytes() { return kVectorBytes; }

// The bfloat16 instructions by name, and terms for float32 gradients. False if this machine does not have them.
bool set_products(const char* name, int count) {
  terms = count;
  for (int i = 0; i < 4; ++i)
    if (!std::strcmp(name, kPathNames[i])) {
      const auto path = static_cast<BFloat16Path>(i);
      if (path_available(path)) bf16_path() = path;
      return path_available(path);
    }
  return false;
}
// Two strips of `tiles` tiles on either side.
void run_multiply_tiles(const uint32_t* left, const uint32_t* right, int64_t tiles, float* out) {
  const TileRegisters registers;
  const TileOperands operands{left, right};
  multiply_tiles(&operands, 1, tiles * kTileWords, tiles * kTileWords, tiles, out);
}

void run_block_factor(bool half, const void* data, int64_t m, int64_t d, double damping, int64_t block_size,
                      const bool* active, double* factor) {
  dispatch(half, data, m, d, damping, block_size, [&](const auto& g) { block_factor(g, active, factor); });
}
void run_inverse_diagonal(bool half, const void* data, int64_t m, int64_t d, double damping, int64_t block_size,
                          const bool* active, float* out) {
  dispatch(half, data, m, d, damping, block_size, [&](const auto& g) { inverse_diagonal(g, active, out); });
}
void run_inverse_product(bool half, const void* data, int64_t m, int64_t d, double damping, int64_t block_size,
                         const bool* active, const double* factor, const float* x, int64_t k, float* out) {
  dispatch(half, data, m, d, damping, block_size,
           [&](const auto& g) { inverse_product(g, active, factor, x, k, out); });
}
double run_joint_update(bool half, const void* data, int64_t m, int64_t d, double damping, int64_t block_size,
                        const bool* kept, float* weights) {
  double loss = 0;
  dispatch(half, data, m, d, damping, block_size,
           [&](const auto& g) { loss = joint_step(g, kept, weights, nullptr, Held{nullptr, 0, nullptr}); });
  return loss;
}
double run_joint_step(bool half, const void* data, int64_t m, int64_t d, double damping, int64_t block_size,
                      const bool* kept, float* weights, float* diagonal, double* gram, int64_t stride, bool* held) {
  double loss = 0;
  dispatch(half, data, m, d, damping, block_size,
           [&](const auto& g) { loss = joint_step(g, kept, weights, diagonal, Held{gram, stride, held}); });
  return loss;
}
void run_independent_update(bool half, const void* data, int64_t m, int64_t d, double damping, int64_t block_size,
                            const bool* active, const bool* kept, const float* diagonal, float* weights) {
  dispatch(half, data, m, d, damping, block_size,
           [&](const auto& g) { independent_update(g, active, kept, diagonal, weights); });
}
double run_quadratic_form(bool half, const void* data, int64_t m, int64_t d, double damping, int64_t block_size,
                          const float* x) {
  double value = 0;
  dispatch(half, data, m, d, damping, block_size, [&](const auto& g) { value = quadratic_form(g, x); });
  return value;
}
void run_group_saliency(bool half, const void* data, int64_t m, int64_t d, double damping, int64_t block_size,
                        const bool* active, const float* weights, const int64_t* positions, int64_t count, int64_t size,
                        const int64_t* members, int64_t subsets, int64_t subset_size, double* gram, int64_t stride,
                        bool* held, float* out) {
  dispatch(half, data, m, d, damping, block_size, [&](const auto& g) {
    group_saliency(g, active, weights, Groups{positions, count, size, members, subsets, subset_size},
                   Held{gram, stride, held}, out);
  });
}
int64_t run_select_smallest(const float* scores, const int64_t* sizes, const int64_t* k, int64_t segments, bool* kept,
                            float* weights) {
  return select_smallest(scores, sizes, k, segments, kept, weights);
}
}
