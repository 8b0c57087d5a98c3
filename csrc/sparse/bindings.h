// The inference kernels as torch ops: checks, allocation of results, dispatch on the type.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>

#include "../cpu/torch_parallel.h"
#include "checks.h"

namespace mfac::sparse {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
Epilogue<T> epilogue_of(const OptionalTensor& bias, c10::string_view activation) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  return {bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr, activation == "none" ? -infinity : 0.0f,
          activation == "relu6" ? 6.0f : infinity};
}

template <typename T>
Weights<T> weights_of(const Tensor& values, const Tensor& columns, const Tensor& pointers, const Tensor& order,
                      at::IntArrayRef shape) {
  return {static_cast<const T*>(values.const_data_ptr()),
          columns.const_data_ptr<int16_t>(),
          pointers.const_data_ptr<int32_t>(),
          order.const_data_ptr<int32_t>(),
          columns.dim() == 1,
          shape[0],
          shape[1]};
}

// Calls f with a value of the type of x.
template <typename F>
void dispatch(const Tensor& x, const F& f) {
  if (x.scalar_type() == at::kBFloat16)
    f(BFloat16());
  else
    f(float());
}

Tensor linear_op(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& pointers,
                 const Tensor& order, const OptionalTensor& bias, at::IntArrayRef shape, c10::string_view activation) {
  check_linear(x, values, columns, pointers, order, bias, shape, activation);
  const Tensor input = x.contiguous();
  const OptionalTensor b = bias ? OptionalTensor(bias->contiguous()) : bias;
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = shape[0];
  Tensor y = at::empty(sizes, x.options());
  if (y.numel() == 0) return y;
  dispatch(x, [&]<typename T>(T) {
    const bool in_range = linear(weights_of<T>(values, columns, pointers, order, shape), epilogue_of<T>(b, activation),
                                 static_cast<const T*>(input.const_data_ptr()), y.numel() / shape[0],
                                 static_cast<T*>(y.mutable_data_ptr()));
    if (!in_range) check_columns(columns, x.size(-1));
  });
  return y;
}

Tensor conv2d_op(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& pointers,
                 const Tensor& order, const OptionalTensor& bias, at::IntArrayRef shape, at::IntArrayRef kernel,
                 at::IntArrayRef stride, at::IntArrayRef padding, c10::string_view activation) {
  check_conv2d(x, values, columns, pointers, order, bias, shape, kernel, stride, padding, activation);
  const Tensor input = x.contiguous();
  const OptionalTensor b = bias ? OptionalTensor(bias->contiguous()) : bias;
  const Convolution size{x.size(0),
                         x.size(1),
                         x.size(2),
                         x.size(3),
                         {kernel[0], kernel[1]},
                         {stride[0], stride[1]},
                         {padding[0], padding[1]}};
  Tensor y = at::empty({x.size(0), shape[0], size.out_height(), size.out_width()}, x.options());
  if (y.numel() == 0) return y;
  dispatch(x, [&]<typename T>(T) {
    conv2d(weights_of<T>(values, columns, pointers, order, shape), epilogue_of<T>(b, activation), size,
           static_cast<const T*>(input.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()));
  });
  return y;
}

Tensor depthwise_conv2d_op(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t stride,
                           c10::string_view activation) {
  check_depthwise_conv2d(x, weight, bias, stride, activation);
  const Tensor input = x.contiguous();
  const OptionalTensor b = bias ? OptionalTensor(bias->contiguous()) : bias;
  const Convolution size{x.size(0), x.size(1), x.size(2), x.size(3), {3, 3}, {stride, stride}, {1, 1}};
  Tensor y = at::empty({x.size(0), x.size(1), size.out_height(), size.out_width()}, x.options());
  if (y.numel() == 0) return y;
  dispatch(x, [&]<typename T>(T) {
    depthwise_conv2d(static_cast<const T*>(weight.const_data_ptr()), epilogue_of<T>(b, activation), size,
                     static_cast<const T*>(input.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()));
  });
  return y;
}

TORCH_LIBRARY_IMPL(mfac_sparse, CPU, m) {
  m.impl("linear", linear_op);
  m.impl("conv2d", conv2d_op);
  m.impl("depthwise_conv2d", depthwise_conv2d_op);
}

}  // namespace
}  // namespace mfac::sparse
