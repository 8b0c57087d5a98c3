// Products of bfloat16 matrices with float32 sums: the instructions, and a stand-in that computes what they compute.
//
// A tile is 16 x 16 pairs of bfloat16 that follow each other along the depth of the product, 1 KiB:
//
//   left   [16 rows][16 pairs]       right   [16 pairs][16 columns]       each the other's transpose, as 32-bit words
//
// left x right is 16 x 16 sums of 32 terms. Products of two bfloat16 are exact in float32; the instructions round sums
// to nearest even, treat denormal operands as zero and flush denormal results to zero. The order of a sum of 32 terms
// differs:
//
//   amx        tdpbf16ps: two sums from zero, of the first and of the second elements of the pairs, then their sum
//   avx512     vdpbf16ps: one sum from zero, pair after pair, the second element before the first
//   stand_in   plain C++, the order and the flushing of amx: the same bits
//
// Sums of 32 terms are then added one after another. Each path gives the same bits on any machine that has it, whatever
// the flags of the build: the instructions are chosen at run time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mfac::cpu {

constexpr int64_t kTile = 16;  // rows, columns or pairs of a tile: AMX's tile registers have 16 rows of 64 bytes
constexpr int64_t kTileTerms = 2 * kTile;      // terms of a sum over one tile
constexpr int64_t kTileWords = kTile * kTile;  // 32-bit words of a tile
constexpr int64_t kSquare = 2 * kTile;         // rows and columns of one call of multiply_tiles: two tiles by two

enum class BFloat16Path { none, avx512, amx, stand_in };

constexpr const char* kPathNames[] = {"none", "avx512", "amx", "stand_in"};

// Whether this processor has the instructions of a path and the operating system lets this process use them.
inline bool path_available(BFloat16Path path) {
  if (path == BFloat16Path::none || path == BFloat16Path::stand_in) return true;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (path == BFloat16Path::avx512)
    return __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#if defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023,
                 kTileData = 18;                  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA; for all threads
  constexpr unsigned kAmx = 1u << 22 | 1u << 24;  // AMX-BF16 and AMX-TILE
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmx) == kAmx &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
#endif
  return false;
}

// The path in use, chosen once: $MFAC_CPU_BF16 if it names one that is available, for tests and benchmarks, else the
// fastest. Processors that have AMX run vdpbf16ps at half the flops of float32 (measured on Xeon 6), so avx512 is for
// those without it.
inline BFloat16Path& bf16_path() {
  static BFloat16Path path = [] {
    const char* asked = std::getenv("MFAC_CPU_BF16");
    for (const auto p : {BFloat16Path::none, BFloat16Path::avx512, BFloat16Path::amx, BFloat16Path::stand_in})
      if (asked && std::string_view(asked) == kPathNames[static_cast<int>(p)] && path_available(p)) return p;
    if (path_available(BFloat16Path::amx)) return BFloat16Path::amx;
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool has_amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // but no permission
    if (!has_amx && path_available(BFloat16Path::avx512)) return BFloat16Path::avx512;
#endif
    return BFloat16Path::none;
  }();
  return path;
}

// Configures the tile registers of the calling thread for its lifetime. multiply_tiles must be called within one.
class TileRegisters {
 public:
  TileRegisters() : on_(bf16_path() == BFloat16Path::amx) {
#if defined(__x86_64__)
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = kTile;
    }
    if (on_) asm volatile("ldtilecfg %0" ::"m"(config));
#endif
  }
  ~TileRegisters() {
#if defined(__x86_64__)
    if (on_) asm volatile("tilerelease");
#endif
  }
  TileRegisters(const TileRegisters&) = delete;

 private:
  bool on_;
};

// Two strips of tiles along the depth on either side, the second `*_next` words behind the first.
struct TileOperands {
  const uint32_t *left, *right;
};

namespace paths {

// The instructions' view of a float or of an element of a pair: denormal numbers are zero.
inline float flush(float x) { return std::abs(x) < 0x1p-126f ? 0.0f : x; }
inline float element(uint32_t pair, int which) {
  const uint32_t bits = which ? pair & 0xffff0000u : pair << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return flush(value);
}

inline void stand_in(const TileOperands& at, int64_t left_next, int64_t right_next, int64_t tiles, float* out) {
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t r = 0; r < kSquare; ++r)
      for (int64_t c = 0; c < kSquare; ++c) {
        const uint32_t* left = at.left + r / kTile * left_next + t * kTileWords + r % kTile * kTile;
        const uint32_t* right = at.right + c / kTile * right_next + t * kTileWords + c % kTile;
        float sums[2] = {};
        for (int64_t p = 0; p < kTile; ++p)
          for (int i = 0; i < 2; ++i) sums[i] = flush(sums[i] + element(left[p], i) * element(right[p * kTile], i));
        float& sum = out[r * kSquare + c];
        sum = flush(sum + flush(sums[0] + sums[1]));
      }
}

#if defined(__x86_64__)

// Four tiles of sums stay in registers for the whole depth: four loads for four products.
inline void amx(const TileOperands* operands, int count, int64_t left_next, int64_t right_next, int64_t tiles,
                float* out) {
  const int64_t row = kSquare * static_cast<int64_t>(sizeof(float)), word = sizeof(uint32_t);
  asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
  for (int i = 0; i < count; ++i) {
    const uint32_t *left = operands[i].left, *right = operands[i].right;
    for (int64_t t = 0; t < tiles; ++t, left += kTileWords, right += kTileWords)
      asm volatile(
          "tileloadd (%0,%4), %%tmm4\n\t"
          "tileloadd (%2,%4), %%tmm6\n\t"
          "tileloadd (%1,%4), %%tmm5\n\t"
          "tileloadd (%3,%4), %%tmm7\n\t"
          "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
          "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
          "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"
          "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(left),
          "r"(left + left_next), "r"(right), "r"(right + right_next), "r"(kTile * word));
  }
  asm volatile(
      "tilestored %%tmm0, (%0,%4)\n\t"
      "tilestored %%tmm1, (%1,%4)\n\t"
      "tilestored %%tmm2, (%2,%4)\n\t"
      "tilestored %%tmm3, (%3,%4)" ::"r"(out),
      "r"(out + kTile), "r"(out + kTile * kSquare), "r"(out + kTile * kSquare + kTile), "r"(row)
      : "memory");
}

// Eight rows of two vectors: sixteen sums hide the latency, and a pair of the left side is broadcast as it is read.
[[gnu::target("avx512f,avx512bf16")]] inline void avx512(const TileOperands& at, int64_t left_next, int64_t right_next,
                                                         int64_t tiles, float* out) {
  constexpr int rows = 8;  // of two vectors: 16 of the 32 registers hold sums
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t r = 0; r < kSquare; r += rows) {
      const uint32_t* left = at.left + r / kTile * left_next + t * kTileWords + r % kTile * kTile;
      const uint32_t* right = at.right + t * kTileWords;
      __m512 sums[rows][2];
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
      for (int64_t p = 0; p < kTile; ++p) {
        const __m512i b[2] = {_mm512_load_si512(right + p * kTile), _mm512_load_si512(right + right_next + p * kTile)};
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          const __m512i a = _mm512_set1_epi32(static_cast<int>(left[i * kTile + p]));
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], (__m512bh)a, (__m512bh)b[v]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          float* sum = out + (r + i) * kSquare + v * kTile;
          _mm512_store_ps(sum, _mm512_load_ps(sum) + sums[i][v]);
        }
    }
}

#endif

}  // namespace paths

// out[kSquare][kSquare] = sum of the `count` products of two strips by two, `tiles` deep each, one after another. All
// pointers are 64-byte aligned.
inline void multiply_tiles(const TileOperands* operands, int count, int64_t left_next, int64_t right_next,
                           int64_t tiles, float* out) {
#if defined(__x86_64__)
  if (bf16_path() == BFloat16Path::amx) return paths::amx(operands, count, left_next, right_next, tiles, out);
#endif
  std::memset(out, 0, kSquare * kSquare * sizeof(float));
  for (int i = 0; i < count; ++i) {
#if defined(__x86_64__)
    if (bf16_path() == BFloat16Path::avx512) {
      paths::avx512(operands[i], left_next, right_next, tiles, out);
      continue;
    }
#endif
    paths::stand_in(operands[i], left_next, right_next, tiles, out);
  }
}

}  // namespace mfac::cpu
