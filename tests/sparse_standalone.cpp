// The inference kernels as a plain shared library, without torch, for test_sparse_standalone.py: any instruction set,
// any sanitizer.
#include <thread>
#include <vector>

#include "../csrc/sparse/conv2d.cpp"
#include "../csrc/sparse/depthwise_conv2d.cpp"
#include "../csrc/sparse/linear.cpp"

namespace mfac::cpu {

static int threads = 1;

int num_threads() { return threads; }

void run_parallel(int64_t count, Task task, const void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next++) < count;) task(context, i);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace mfac::cpu

using namespace mfac::sparse;

namespace {

// Calls f with a null pointer of the type.
template <typename F>
void dispatch(bool half, const F& f) {
  if (half)
    f(static_cast<const BFloat16*>(nullptr));
  else
    f(static_cast<const float*>(nullptr));
}

template <typename T>
Epilogue<T> epilogue(const void* bias, float low, float high) {
  return {static_cast<const T*>(bias), low, high};
}

// W in slices; `shape` is rows, inputs, whether there are blocks.
template <typename T>
Weights<T> weights(const void* values, const void* columns, const void* pointers, const void* order,
                   const int64_t* shape) {
  return {static_cast<const T*>(values),
          static_cast<const int16_t*>(columns),
          static_cast<const int32_t*>(pointers),
          static_cast<const int32_t*>(order),
          shape[2] != 0,
          shape[0],
          shape[1]};
}

}  // namespace

extern "C" {

void set_threads(int count) { mfac::cpu::threads = count; }
int vector_bytes() { return mfac::cpu::kVectorBytes; }

bool run_linear(bool half, const void* values, const void* columns, const void* pointers, const void* order,
                const int64_t* shape, const void* bias, float low, float high, const void* x, int64_t m, void* y) {
  bool right = true;
  dispatch(half, [&]<typename T>(const T*) {
    const auto w = weights<T>(values, columns, pointers, order, shape);
    right = linear(w, epilogue<T>(bias, low, high), static_cast<const T*>(x), m, static_cast<T*>(y));
  });
  return right;
}

// `size` is images, channels, height, width, and twice each kernel, stride and padding.
void run_conv2d(bool half, const void* values, const void* columns, const void* pointers, const void* order,
                const int64_t* shape, const void* bias, float low, float high, const void* x, const int64_t* size,
                void* y) {
  const Convolution c{size[0], size[1], size[2], size[3], {size[4], size[5]}, {size[6], size[7]}, {size[8], size[9]}};
  dispatch(half, [&]<typename T>(const T*) {
    const auto w = weights<T>(values, columns, pointers, order, shape);
    conv2d(w, epilogue<T>(bias, low, high), c, static_cast<const T*>(x), static_cast<T*>(y));
  });
}

void run_depthwise_conv2d(bool half, const void* weight, const void* bias, float low, float high, const void* x,
                          const int64_t* size, void* y) {
  const Convolution c{size[0], size[1], size[2], size[3], {3, 3}, {size[4], size[4]}, {1, 1}};
  dispatch(half, [&]<typename T>(const T*) {
    depthwise_conv2d(static_cast<const T*>(weight), epilogue<T>(bias, low, high), c, static_cast<const T*>(x),
                     static_cast<T*>(y));
  });
}

}  // extern "C"
