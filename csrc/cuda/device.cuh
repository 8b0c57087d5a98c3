// What the kernels need of the CUDA runtime and of tensor cores: launches, shared memory, memory sizes, a product by
// a warp. The kernels include it as <device.cuh>, because tests/emulation has a replacement, which runs them as C++ on
// the CPU.
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

// One step of a product by a warp, on tensor cores (sm_80 on): sums [32, 32] += a [32, 8] b [8, 32]. Lane t has
//
//   a[p][2 h + g]      row 16 p + 8 g + t / 4, place t % 4 + 4 h in the depth of the product
//   b[q][h]            column 8 q + t / 4, the same place
//   sums[p][q][2 g + v] row 16 p + 8 g + t / 4, column 8 q + t % 4 * 2 + v
__device__ inline void tensor_multiply_add(double (&sums)[2][4][4], const double (&a)[2][4], const double (&b)[4][2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#pragma unroll
  for (int p = 0; p < 2; ++p)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      double (&s)[4] = sums[p][q];
#if __CUDA_ARCH__ >= 900
      asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+d"(s[0]), "+d"(s[1]), "+d"(s[2]), "+d"(s[3])
          : "d"(a[p][0]), "d"(a[p][1]), "d"(a[p][2]), "d"(a[p][3]), "d"(b[q][0]), "d"(b[q][1]));
#else
#pragma unroll
      for (int g = 0; g < 2; ++g)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
              : "+d"(s[2 * g]), "+d"(s[2 * g + 1])
              : "d"(a[p][2 * h + g]), "d"(b[q][h]));
#endif
    }
#endif
}

// Maximum bytes of shared memory of a block of threads on the current GPU: from 64 KiB (RTX 20) to 227 KiB
// (H100).
inline int64_t shared_limit() {
  int device = 0, bytes = 48 << 10;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Bytes that the temporaries of an op should not exceed: enough blocks of F at a time to keep every multiprocessor busy
// with several matrices one after another. With m = 256 a block takes 1.5 MiB, so that kMax holds some 2,700.
inline int64_t temporaries_limit() {
  constexpr size_t kMin = 128 << 20, kMax = 4ll << 30;  // on GPUs of less than 4 GiB, of more than 128 GiB
  constexpr size_t kShare = 32;                         // of the GPU's memory: most of it is for the gradients
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
