// The schemas of all ops. cpu/bindings.h and cuda/bindings.cpp register the kernels; mfac/ops/ has the Python
// functions, the fake kernels and the docstrings.
//
//   m   gradients           grads       [m, d] float32 or bfloat16, rows contiguous, never written
//   d   prunable weights    damping     λ > 0 of F = λ I + (1/m) Gᵀ G; never 1/λ
//   B   block_size >= 1     active      [d] bool: columns that take part, the others as if their gradients were zero
//   s   min(m, B, d)        kept        [d] bool: False = pruned
//                           precision   "highest", "high" or "medium": of the large products (mfac/ops)
//
// F is block-diagonal with blocks of B columns, the last one shorter; B >= d is the full matrix.
#pragma once

#include <torch/library.h>

TORCH_LIBRARY(mfac, m) {
  // [ceil(d/B), s, s] float64: lower Cholesky factors of mλ I + G Gᵀ (m < columns in use) or mλ I + GᵀG, zero-padded.
  m.def("block_factor(Tensor grads, float damping, int block_size, Tensor? active=None) -> Tensor");
  // [d] float32: diagonal of F⁻¹.
  m.def(
      "inverse_diagonal(Tensor grads, float damping, int block_size, Tensor? active=None, str precision='highest') -> "
      "Tensor");
  // F⁻¹ x for x [d] or [k, d] float32, with `factor` from block_factor of the same arguments; shaped like x.
  m.def(
      "inverse_product(Tensor grads, Tensor factor, Tensor x, float damping, int block_size, Tensor? active=None) -> "
      "Tensor");
  // weights [d] float32, the only tensor written: zero where not kept, elsewhere the minimiser of ½ δᵀFδ. Returns that
  // minimum, a float64 scalar.
  m.def(
      "joint_update(Tensor grads, Tensor(a!) weights, Tensor kept, float damping, int block_size, str "
      "precision='highest') -> Tensor");
  // joint_update; if `diagonal`, also [d] float32: diagonal of F⁻¹ with kept as the columns in use, 1/λ elsewhere; else
  // an empty tensor.
  //
  // gram [ceil(d/B), 2 + n] float64 and held [d] bool, if given, are written: a call stores small matrices there for
  // the next call of joint_step or group_saliency with the same gradients, damping, blocks and precision. Initially
  // gram[:, 0] = 0 and held = False. Layout: cpu/held_gram.h. CUDA ops do not use them.
  m.def(
      "joint_step(Tensor grads, Tensor(a!) weights, Tensor kept, float damping, int block_size, str "
      "precision='highest', Tensor(b!)? gram=None, Tensor(c!)? held=None, bool diagonal=True) -> (Tensor, Tensor)");
  // weights [d] float32, the only tensor written: minus F⁻¹u, zero where not kept.
  m.def(
      "independent_update(Tensor grads, Tensor(a!) weights, Tensor kept, Tensor inverse_diagonal, float damping, int "
      "block_size, Tensor? active=None, str precision='highest') -> ()");
  // ½ xᵀFx for x [d] float32; a float64 scalar.
  m.def("quadratic_form(Tensor grads, Tensor x, float damping, int block_size) -> Tensor");
  // [n, k] float32: ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q for the k subsets Q of each of n groups of weights [d] float32.
  // groups [n, P] int64 are positions in [0, d), -1 for none; subsets [k, s] int64 are places in [0, P). gram and held
  // as for joint_step.
  m.def(
      "group_saliency(Tensor grads, Tensor weights, Tensor groups, Tensor subsets, float damping, int block_size, "
      "Tensor? active=None, str precision='highest', Tensor(a!)? gram=None, Tensor(b!)? held=None) -> Tensor");
  // [n] bool, False for the k smallest of scores [n] float32, ties to the lower index; or for the k[i] smallest of each
  // of the consecutive segments of sizes[i] scores. NaN is an error.
  // weights [n] float32, if given the only tensor written: zero where pruned.
  m.def("select_smallest(Tensor scores, int[1] k, int[]? sizes=None, Tensor(a!)? weights=None) -> Tensor");
}
