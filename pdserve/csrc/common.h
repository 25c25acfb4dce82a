// What all kernels share: what the machine can do, the two element types, memory of a thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define PDS_AVX512_BF16 1
#include <immintrin.h>
#endif

#if defined(PDS_AVX512_BF16) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define PDS_AMX 1
#endif

// Before loops over arrays that are meant to be registers: gcc keeps an array in memory unless it sees constant
// indices.
#define PDS_UNROLL _Pragma("GCC unroll 32")

#define PDS_INLINE inline __attribute__((always_inline))

// A brain float: the upper half of a float. Arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};

PDS_INLINE float to_float(float x) { return x; }
PDS_INLINE float to_float(bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

template <class T>
T from_float(float x);
template <>
PDS_INLINE float from_float<float>(float x) {
  return x;
}
// Round to nearest, ties to even; NaN stays NaN.
template <>
PDS_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bf16{static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

// This thread's T. Not inlined: the address of thread-local storage would be looked up at every use.
template <class T>
__attribute__((noinline)) T& of_this_thread() {
  static thread_local T object;
  return object;
}

// Memory of one thread that grows to what was asked for and is reused; 64-byte aligned.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class T>
  T* get(size_t count) {
    const size_t need = (count * sizeof(T) + 63) / 64 * 64;
    if (need > bytes_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, need);
      if (data_ == nullptr) std::abort();
      bytes_ = need;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

PDS_INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }
PDS_INLINE int smaller(int a, int b) { return a < b ? a : b; }
PDS_INLINE int larger(int a, int b) { return a > b ? a : b; }
