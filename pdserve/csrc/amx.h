// Intel AMX: eight tile registers of 16 rows of 64 bytes, and a product of two of them into a third. What a tile holds
// is laid out in simd.h.
#pragma once

#include "simd.h"

#if PDS_AMX
#include <sys/syscall.h>
#include <unistd.h>

// Linux hands out the tile state on request, once per process (arch_prctl(2), Documentation/arch/x86/xstate.rst).
inline bool amx_request() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// All eight tiles at their full size while it lives, in this thread; then none, so that a context switch saves nothing.
class AmxScope {
 public:
  AmxScope() {
    alignas(64) struct {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~AmxScope() { _tile_release(); }
  AmxScope(const AmxScope&) = delete;
};

// Tiles 0..3, [upper, lower] rows by [left, right] columns, += two tiles of rows (4, 5) times two of columns (6, 7).
// STREAM: the columns are read past the L1 cache, which so keeps the rows; worth a third of the speed where both would
// not fit.
template <bool STREAM>
PDS_INLINE void multiply_2x2(const bf16* upper, const bf16* lower, int64_t row_bytes, const bf16* left,
                             const bf16* right) {
  if constexpr (STREAM) {
    _tile_stream_loadd(6, left, 64);
  } else {
    _tile_loadd(6, left, 64);
  }
  _tile_loadd(4, upper, row_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, lower, row_bytes);
  _tile_dpbf16ps(1, 5, 6);
  if constexpr (STREAM) {
    _tile_stream_loadd(7, right, 64);
  } else {
    _tile_loadd(7, right, 64);
  }
  _tile_dpbf16ps(2, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
}

// Tiles 0..3 as [32, 32] floats.
PDS_INLINE void zero_2x2() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
PDS_INLINE void load_2x2(const float* from) {
  _tile_loadd(0, from, 128);
  _tile_loadd(1, from + 16 * 32, 128);
  _tile_loadd(2, from + 16, 128);
  _tile_loadd(3, from + 16 * 32 + 16, 128);
}
PDS_INLINE void store_2x2(float* to) {
  _tile_stored(0, to, 128);
  _tile_stored(1, to + 16 * 32, 128);
  _tile_stored(2, to + 16, 128);
  _tile_stored(3, to + 16 * 32 + 16, 128);
}

#endif
