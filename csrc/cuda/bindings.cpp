// Registers the CUDA ops with torch. <op>.h has an op's host code, <op>.cu its kernels and equation. Headers, so that
// torch's headers, most of the compile time, are parsed once.
//
// Everything runs on torch's current stream. The host waits for the GPU only where it needs a number: how many columns
// are in use, whether a factorisation failed, between the steps of a selection.
#include <torch/library.h>

#include "block_factor.h"
#include "group_saliency.h"
#include "independent_update.h"
#include "inverse_diagonal.h"
#include "inverse_product.h"
#include "joint_step.h"
#include "quadratic_form.h"
#include "select_smallest.h"

namespace mfac::cuda {

TORCH_LIBRARY_IMPL(mfac, CUDA, m) {
  m.impl("block_factor", block_factor_op);
  m.impl("inverse_diagonal", inverse_diagonal_op);
  m.impl("inverse_product", inverse_product_op);
  m.impl("joint_update", joint_update_op);
  m.impl("joint_step", joint_step_op);
  m.impl("independent_update", independent_update_op);
  m.impl("quadratic_form", quadratic_form_op);
  m.impl("group_saliency", group_saliency_op);
  m.impl("select_smallest", select_smallest_op);
}

}  // namespace mfac::cuda
