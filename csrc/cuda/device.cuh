// What the kernels need of CUDA besides its language: how one is launched, and its shared memory. The kernels include it as
// <device.cuh>, because tests/emulation has another one, which runs them as C++ on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mfac::cuda {

// The shared memory of a block of threads as a T. Its size is an argument of launch().
template <typename T>
__device__ T& shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return *reinterpret_cast<T*>(memory);
}

// Bytes of shared memory that a block of threads may have on the current GPU: from 99 KiB (RTX 30, 40, 50) to 227 (H100).
inline int64_t shared_limit() {
  int device = 0, bytes = 48 << 10;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Bytes that the temporaries of an op should keep to: so much that the blocks of a tile keep every multiprocessor busy, each
// of which factors one of them at a time, on GPUs that have room for it.
inline int64_t temporaries_limit() {
  constexpr size_t kMin = 128 << 20, kMax = 1 << 30, kShare = 16;
  size_t available = 0, total = 0;
  if (cudaMemGetInfo(&available, &total) != cudaSuccess) return kMin;
  return static_cast<int64_t>(total / kShare < kMin ? kMin : total / kShare > kMax ? kMax : total / kShare);
}

// Runs a kernel on `blocks` blocks of `threads` threads, if there are any, each with so many bytes of shared memory.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  constexpr size_t kDefaultSharedBytes = 48 << 10;  // bytes of shared memory that need no leave
  if (blocks == 0) return;
  if (blocks > INT32_MAX)
    throw std::runtime_error("mfac: a CUDA kernel would need more than 2^31 - 1 blocks of threads");
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kDefaultSharedBytes)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or torch would report it again, elsewhere
  throw std::runtime_error(std::string("mfac: a CUDA kernel cannot be launched: ") + cudaGetErrorString(error));
}

}  // namespace mfac::cuda
