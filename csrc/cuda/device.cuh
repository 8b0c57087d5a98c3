// What the kernels need of the CUDA runtime: launches, shared memory, and memory sizes. The kernels include it as
// <device.cuh>, because tests/emulation has a replacement, which runs them as C++ on the CPU.
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

// Maximum bytes of shared memory of a block of threads on the current GPU: from 99 KiB (RTX 30, 40, 50) to 227 KiB
// (H100).
inline int64_t shared_limit() {
  int device = 0, bytes = 48 << 10;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Bytes that the temporaries of an op should not exceed: enough blocks of F at a time to keep every multiprocessor
// busy, each of which factors one at a time. A batch of blocks of 512 columns takes 4 MiB per block with m = 256: at
// most 256 of them.
inline int64_t temporaries_limit() {
  constexpr size_t kMin = 128 << 20, kMax = 1 << 30;  // on GPUs of less than 2 GiB, of more than 16 GiB
  constexpr size_t kShare = 16;                       // of the GPU's memory: most of it is for the gradients
  size_t available = 0, total = 0;
  if (cudaMemGetInfo(&available, &total) != cudaSuccess) return kMin;
  return static_cast<int64_t>(total / kShare < kMin ? kMin : total / kShare > kMax ? kMax : total / kShare);
}

// Launches a kernel on `blocks` blocks (possibly 0) of `threads` threads, each block with shared_bytes of shared
// memory.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  constexpr size_t kDefaultSharedBytes = 48 << 10;  // available without opt-in
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
  cudaGetLastError();  // clears it, or torch would report it again later
  throw std::runtime_error(std::string("mfac: a CUDA kernel cannot be launched: ") + cudaGetErrorString(error));
}

}  // namespace mfac::cuda
