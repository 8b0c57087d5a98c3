// Numerical limits that the kernels of all devices share. No torch in here.
#pragma once

namespace mfac {

// Attempts to factor a matrix that rounding made indefinite: one as it is, then with a jitter on the diagonal of the
// rounding error of its elements, ten times as much at each further attempt. After the last, 1e8 times the rounding
// error, it is not rounding that is wrong.
constexpr int kFactorAttempts = 10;

// Pivots of a piece of F⁻¹ are at least this part of the numbers that they are a difference of: all that float64
// leaves.
constexpr double kMinPivot = 1e-13;

}  // namespace mfac
