// Entry points of the inference kernels: raw pointers and sizes, no torch. Each is defined in the file of its name, for
// T = float and BFloat16. Sums are float32.
#pragma once

#include <cstdint>

#include "../cpu/scratch.h"
#include "../cpu/vector.h"

namespace mfac::sparse {

using cpu::BFloat16;

constexpr int kSliceRows = 4;     // rows of a slice: schemas.h
constexpr int kWindowRows = 128;  // rows within which `order` permutes; a power of two (checks.h)
constexpr int kWindowSlices = kWindowRows / kSliceRows;

// W [rows, inputs] in slices (schemas.h).
template <typename T>
struct Weights {
  const T* values;          // [steps, 4]
  const int16_t* columns;   // [steps, 4], or [steps] if `blocks`
  const int32_t* pointers;  // [slices + 1]
  const int32_t* order;     // [4 slices]
  bool blocks;
  int64_t rows, inputs;

  int64_t slices() const { return cpu::ceil_div(rows, kSliceRows); }
  int64_t windows() const { return cpu::ceil_div(rows, kWindowRows); }
};

// What follows the sum: y = clamp(sum + bias, low, high); low = -inf and high = inf for no activation.
template <typename T>
struct Epilogue {
  const T* bias;  // [rows], or null
  float low, high;
};

// y[m, rows] = x[m, inputs] Wᵀ. Columns must be in [0, inputs] if m > 1; for m = 1 this is checked on the way: returns
// false if one is not, and y is then not the product.
template <typename T>
bool linear(const Weights<T>& weights, const Epilogue<T>& epilogue, const T* x, int64_t m, T* y);

struct Convolution {
  int64_t images, channels, height, width;  // of x
  int64_t kernel[2], stride[2], padding[2];

  int64_t out_height() const { return (height + 2 * padding[0] - kernel[0]) / stride[0] + 1; }
  int64_t out_width() const { return (width + 2 * padding[1] - kernel[1]) / stride[1] + 1; }
};

// y[images, rows, out_height, out_width]
template <typename T>
void conv2d(const Weights<T>& weights, const Epilogue<T>& epilogue, const Convolution& shape, const T* x, T* y);

// y[images, channels, out_height, out_width]; weight[channels, 9]. Kernel 3 x 3, padding 1, stride 1 or 2.
template <typename T>
void depthwise_conv2d(const T* weight, const Epilogue<T>& epilogue, const Convolution& shape, const T* x, T* y);

}  // namespace mfac::sparse
