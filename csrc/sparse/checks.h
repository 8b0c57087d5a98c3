// Argument checks of the inference ops: check_<op> takes all arguments of an op. Messages have the form
// `name: expected ..., got ...`. Numbers in columns and order are checked too: a wrong one would read beyond a buffer.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "kernels.h"

namespace mfac::sparse {

inline void check_activation(c10::string_view activation) {
  TORCH_CHECK_VALUE(activation == "none" || activation == "relu" || activation == "relu6",
                    "activation: expected 'none', 'relu' or 'relu6', got '", activation, "'");
}

inline void check_input(const at::Tensor& x, const std::optional<at::Tensor>& bias, int64_t outputs) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
                   "x: expected float32 or bfloat16, got ", x.scalar_type());
  if (!bias) return;
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == outputs, "bias: expected shape [", outputs, "], got ",
                    bias->sizes());
  TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), "bias: expected ", x.scalar_type(), " like x, got ",
                   bias->scalar_type());
}

inline void check_type(const at::Tensor& t, const char* name, at::ScalarType type) {
  TORCH_CHECK_TYPE(t.scalar_type() == type, name, ": expected ", type, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.is_contiguous(), name, ": expected a contiguous tensor on the CPU, got ",
                    "strides ", t.strides(), " on ", t.device());
}

// All of a sparse W of this shape (schemas.h) but the numbers in columns; x has `given` inputs per output.
inline void check_weights(const at::Tensor& values, const at::Tensor& columns, const at::Tensor& pointers,
                          const at::Tensor& order, at::IntArrayRef shape, int64_t given, at::ScalarType type) {
  check_type(values, "values", type);
  check_type(columns, "columns", at::kShort);
  check_type(pointers, "pointers", at::kInt);
  check_type(order, "order", at::kInt);
  const int64_t outputs = shape[0], inputs = shape[1];
  TORCH_CHECK_VALUE(0 <= outputs && outputs < INT32_MAX - kSliceRows && 0 <= inputs && inputs < INT16_MAX,
                    "shape: expected [N, K] with N < 2^31 and K < ", INT16_MAX, ", got ", shape);
  TORCH_CHECK_VALUE(given == inputs, "x: expected ", inputs, " inputs per output, got ", given);
  const int64_t slices = (outputs + kSliceRows - 1) / kSliceRows;
  TORCH_CHECK_VALUE(values.dim() == 2 && values.size(1) == kSliceRows, "values: expected shape [steps, ", kSliceRows,
                    "], got ", values.sizes());
  const int64_t steps = values.size(0);
  TORCH_CHECK_VALUE(columns.dim() >= 1 && columns.size(0) == steps &&
                        (columns.dim() == 1 || (columns.dim() == 2 && columns.size(1) == kSliceRows)),
                    "columns: expected shape [", steps, "] or [", steps, ", ", kSliceRows, "], got ", columns.sizes());
  TORCH_CHECK_VALUE(pointers.dim() == 1 && pointers.size(0) == slices + 1, "pointers: expected shape [", slices + 1,
                    "], got ", pointers.sizes());
  TORCH_CHECK_VALUE(order.dim() == 1 && order.size(0) == slices * kSliceRows, "order: expected shape [",
                    slices * kSliceRows, "], got ", order.sizes());
  const int32_t* begin = pointers.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(begin[0] == 0 && begin[slices] == steps, "pointers: expected 0 to ", steps, ", got ", begin[0],
                    " to ", begin[slices]);
  bool falls = false, misplaced = false;  // no branch per element: large layers have thousands
  for (int64_t s = 0; s < slices; ++s) falls |= begin[s] > begin[s + 1];
  for (int64_t s = 0; falls && s < slices; ++s)
    TORCH_CHECK_VALUE(begin[s] <= begin[s + 1], "pointers: expected non-decreasing numbers, got ", begin[s], " before ",
                      begin[s + 1]);
  const int32_t* row = order.const_data_ptr<int32_t>();
  const auto count = static_cast<int32_t>(outputs), places = static_cast<int32_t>(slices * kSliceRows);
  const auto wrong = [&](int32_t i) {
    return (row[i] != -1) & ((row[i] < 0) | (row[i] >= count) | ((row[i] ^ i) >= kWindowRows));
  };
  for (int32_t i = 0; i < places; ++i) misplaced |= wrong(i);
  for (int32_t i = 0; misplaced && i < places; ++i)
    TORCH_CHECK_VALUE(!wrong(i), "order: expected -1 or rows below ", outputs, " in their windows of ", kWindowRows,
                      ", got ", row[i], " at position ", i);
}

// Columns [..] in [0, inputs]: one pass over 2 bytes per entry.
inline void check_columns(const at::Tensor& columns, int64_t inputs) {
  const int16_t* column = columns.const_data_ptr<int16_t>();
  const int64_t entries = columns.numel();
  int16_t low = 0, high = 0;
  for (int64_t i = 0; i < entries; ++i) {
    low = std::min(low, column[i]);
    high = std::max(high, column[i]);
  }
  TORCH_CHECK_VALUE(low >= 0 && high <= inputs, "columns: expected numbers in [0, ", inputs, "], got ", low, " to ",
                    high);
}

inline void check_images(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x: expected shape [n, channels, height, width], got ", x.sizes());
}

inline void check_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns,
                         const at::Tensor& pointers, const at::Tensor& order, const std::optional<at::Tensor>& bias,
                         at::IntArrayRef shape, c10::string_view activation) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "x: expected shape [..., inputs], got a scalar");
  check_input(x, bias, shape[0]);
  check_weights(values, columns, pointers, order, shape, x.size(-1), x.scalar_type());
  if (x.size(-1) == 0 || x.numel() != x.size(-1)) check_columns(columns, x.size(-1));  // for one sample the kernel does
  check_activation(activation);
}

inline void check_conv2d(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns,
                         const at::Tensor& pointers, const at::Tensor& order, const std::optional<at::Tensor>& bias,
                         at::IntArrayRef shape, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                         c10::string_view activation) {
  check_images(x);
  check_input(x, bias, shape[0]);
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(kernel[i] >= 1, "kernel: expected numbers >= 1, got ", kernel);
    TORCH_CHECK_VALUE(stride[i] >= 1, "stride: expected numbers >= 1, got ", stride);
    TORCH_CHECK_VALUE(padding[i] >= 0, "padding: expected numbers >= 0, got ", padding);
    TORCH_CHECK_VALUE(x.size(2 + i) + 2 * padding[i] >= kernel[i],
                      "x: expected height and width of at least the kernel's ", kernel, ", got ", x.sizes());
  }
  check_weights(values, columns, pointers, order, shape, x.size(1) * kernel[0] * kernel[1], x.scalar_type());
  check_columns(columns, x.size(1) * kernel[0] * kernel[1]);
  check_activation(activation);
}

inline void check_depthwise_conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                   int64_t stride, c10::string_view activation) {
  check_images(x);
  check_input(x, bias, x.size(1));
  check_type(weight, "weight", x.scalar_type());
  TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef({x.size(1), 1, 3, 3}), "weight: expected shape [", x.size(1),
                    ", 1, 3, 3], got ", weight.sizes());
  TORCH_CHECK_VALUE(x.size(2) >= 1 && x.size(3) >= 1, "x: expected height and width >= 1, got ", x.sizes());
  TORCH_CHECK_VALUE(stride == 1 || stride == 2, "stride: expected 1 or 2, got ", stride);
  check_activation(activation);
}

}  // namespace mfac::sparse
