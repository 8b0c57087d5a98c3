// Scratch memory of the kernels: 64-byte aligned, kept by each thread from one call to the next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace mfac::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A cache of the thread's scratch memory: malloc returns large pieces to the system, and page faults on them for every
// block cost as much as a factorisation.
class Scratch {
 public:
  static void* take(size_t bytes) {
    Scratch& own = of_thread();
    for (Piece& piece : own.pieces_)
      if (piece.data && piece.bytes >= bytes && piece.bytes <= 2 * bytes) return std::exchange(piece.data, nullptr);
    return std::aligned_alloc(64, bytes);
  }
  static void give(void* data, size_t bytes) {
    if (bytes > kMaxKeptBytes) return std::free(data);
    Scratch& own = of_thread();
    const auto free = std::find_if(own.pieces_, own.pieces_ + kPieces, [](const Piece& piece) { return !piece.data; });
    Piece& place = free < own.pieces_ + kPieces ? *free : own.pieces_[own.next_++ % kPieces];
    std::free(std::exchange(place, {data, bytes}).data);
  }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (const Piece& piece : pieces_) std::free(piece.data);
  }

 private:
  static constexpr int kPieces = 16;                // more than an op has at a time; with kMaxKeptBytes, 32 MiB at most
  static constexpr size_t kMaxKeptBytes = 2 << 20;  // of a piece: a matrix of order 512
  struct Piece {
    void* data = nullptr;
    size_t bytes = 0;
  };
  static Scratch& of_thread() {
    thread_local Scratch scratch;
    return scratch;
  }
  Piece pieces_[kPieces];
  unsigned next_ = 0;
};

// Uninitialised, 64-byte aligned scratch memory.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : bytes_(round_up(std::max<int64_t>(count, 1) * sizeof(T), 64)), data_(static_cast<T*>(Scratch::take(bytes_))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { Scratch::give(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  size_t bytes_;
  T* data_;
};

}  // namespace mfac::cpu
