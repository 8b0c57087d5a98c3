// Entry points of the CPU kernels: raw pointers and sizes, no torch. Each is defined in the file of its name, for G =
// float and BFloat16. `active` and `kept` are masks of d elements, `active` may be null (every column is in use).
#pragma once

#include "block.h"

namespace mfac::cpu {

// factor[blocks, s, s] float64, s = min(m, B): L of each block's A (block.h), in the leading rows and columns.
template <typename G>
void block_factor(const Gradients<G>& grads, const bool* active, double* factor);

// out[d] = diagonal of F⁻¹.
template <typename G>
void inverse_diagonal(const Gradients<G>& grads, const bool* active, float* out);

// out[k, d] = F⁻¹ x for each of the k rows of x[k, d].
template <typename G>
void inverse_product(const Gradients<G>& grads, const bool* active, const double* factor, const float* x, int64_t k,
                     float* out);

// What a call of joint_step or group_saliency keeps for the next one (held_gram.h); pointers are null if nothing is
// kept.
struct Held {
  double* gram;  // [blocks, stride]
  int64_t stride;
  bool* columns;  // [d]
};

// weights[d]: pruned weights become zero, kept ones move to the minimum of ½ δᵀFδ. Returns that minimum.
// inverse_diagonal[d], unless null, becomes the diagonal of F⁻¹ with `kept` as the columns in use.
template <typename G>
double joint_step(const Gradients<G>& grads, const bool* kept, float* weights, float* inverse_diagonal,
                  const Held& held);

// weights[d] -= F⁻¹ u with u_i = w_i / [F⁻¹]_ii on the pruned weights, which then become zero.
template <typename G>
void independent_update(const Gradients<G>& grads, const bool* active, const bool* kept, const float* inverse_diagonal,
                        float* weights);

// ½ xᵀFx
template <typename G>
double quadratic_form(const Gradients<G>& grads, const float* x);

// Groups of weights, and the subsets of a group whose saliencies are compared (group_saliency.cpp).
struct Groups {
  const int64_t* positions;  // [count, size] in [0, d), or -1: the group has fewer members
  int64_t count, size;
  const int64_t* members;  // [subsets, subset_size] in [0, size)
  int64_t subsets, subset_size;
};

// out[count, subsets] = ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q for every subset Q of every group.
template <typename G>
void group_saliency(const Gradients<G>& grads, const bool* active, const float* weights, const Groups& groups,
                    const Held& held, float* out);

// For each segment i of sizes[i] scores, one after another: kept = false for the k[i] smallest, ties to the lower
// index; weights, unless null, become zero there. Returns the position of a NaN, with nothing written, or -1.
int64_t select_smallest(const float* scores, const int64_t* sizes, const int64_t* k, int64_t segments, bool* kept,
                        float* weights);

}  // namespace mfac::cpu
