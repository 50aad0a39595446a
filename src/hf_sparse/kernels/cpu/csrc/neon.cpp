// NEON (every aarch64): 16 rows are four vectors of 4. `tbl` expands 8 words at a time, as pshufb
// does on AVX2, and 32 registers leave room for as many accumulators as AVX-512 has.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstring>

#include "byte_tables.h"
#include "convert.h"
#include "tiles.h"

namespace tiles {
namespace {

#include "vector_path.h"

struct Isa : IsaDefaults {
  using F = float32x4_t;
  static constexpr int V = 4;
  static constexpr int kAccumulators = 16;

  static TILE_INLINE F zero() { return vdupq_n_f32(0.0f); }
  static TILE_INLINE F load(const float* p) { return vld1q_f32(p); }
  static TILE_INLINE void store(float* p, F a) { vst1q_f32(p, a); }
  static TILE_INLINE F set1(float a) { return vdupq_n_f32(a); }
  static TILE_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
  static TILE_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
  static TILE_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }

  static TILE_INLINE void load16(const void* p, int64_t i, int32_t dtype, float* out) {
    if (dtype == kF32) {
      std::memcpy(out, static_cast<const float*>(p) + i, 16 * sizeof(float));
      return;
    }
    for (int part = 0; part < 4; ++part) {
      const uint16x4_t h = vld1_u16(static_cast<const uint16_t*>(p) + i + part * 4);
      store(out + part * 4, dtype == kF16 ? vcvt_f32_f16(vreinterpret_f16_u16(h))
                                          : vreinterpretq_f32_u32(vshll_n_u16(h, 16)));
    }
  }

  static TILE_INLINE void store16(void* p, int64_t i, int32_t dtype, const float* in) {
    if (dtype == kF32) {
      std::memcpy(static_cast<float*>(p) + i, in, 16 * sizeof(float));
    } else if (dtype == kF16) {
      for (int part = 0; part < 4; ++part) {
        vst1_u16(static_cast<uint16_t*>(p) + i + part * 4,
                 vreinterpret_u16_f16(vcvt_f16_f32(load(in + part * 4))));
      }
    } else {
      for (int r = 0; r < 16; ++r) static_cast<uint16_t*>(p)[i + r] = to_bf16(in[r]);
    }
  }

  static TILE_INLINE uint8x16_t expand(const void* values, const uint8_t* table) {
    return vqtbl1q_u8(vld1q_u8(static_cast<const uint8_t*>(values)), vld1q_u8(table));
  }

  // Words to the top halves of dwords: column 0 and column 1 of 4 rows.
  static TILE_INLINE void split_words(uint8x16_t bytes, uint32x4_t& even, uint32x4_t& odd) {
    const uint32x4_t words = vreinterpretq_u32_u8(bytes);
    even = vshlq_n_u32(words, 16);
    odd = vandq_u32(words, vdupq_n_u32(0xffff0000u));
  }

  // 8 values as bytes; int4 times 16.
  static TILE_INLINE uint8x8_t eight_bytes(const int8_t* values) {
    return vld1_u8(reinterpret_cast<const uint8_t*>(values));
  }
  static TILE_INLINE uint8x8_t eight_bytes(Nibbles values) {
    const EightNibbles eight = eight_nibbles(values);
    return vzip1_u8(vcreate_u8(eight.even), vcreate_u8(eight.odd));
  }

  // 4 rows, from a mask of 8 bits.
  template <int32_t D>
  static TILE_INLINE void decode4(Values<D> values, uint32_t mask, F& even, F& odd) {
    if constexpr (D == kF32) {
      const uint32_t low = mask & 15u;
      const F a = vreinterpretq_f32_u8(expand(values, kTables.dwords[low]));
      const F b = vreinterpretq_f32_u8(
          expand(values + __builtin_popcount(low), kTables.dwords[mask >> 4]));
      even = vuzp1q_f32(a, b);
      odd = vuzp2q_f32(a, b);
    } else if constexpr (D == kBF16) {
      uint32x4_t e, o;
      split_words(expand(values, kTables.words[mask]), e, o);
      even = vreinterpretq_f32_u32(e);
      odd = vreinterpretq_f32_u32(o);
    } else if constexpr (D == kF16) {
      const float16x8_t h = vreinterpretq_f16_u8(expand(values, kTables.columns[mask]));
      even = vcvt_f32_f16(vget_low_f16(h));
      odd = vcvt_f32_f16(vget_high_f16(h));
    } else {
      const int8x8_t bytes =
          vreinterpret_s8_u8(vtbl1_u8(eight_bytes(values), vld1_u8(kTables.bytes[mask])));
      uint32x4_t e, o;
      split_words(vreinterpretq_u8_s16(vmovl_s8(bytes)), e, o);
      even = vcvtq_f32_s32(vreinterpretq_s32_u32(e));
      odd = vcvtq_f32_s32(vreinterpretq_s32_u32(o));
    }
  }

  template <int32_t D>
  static TILE_INLINE void decode(Values<D> values, uint32_t mask, F (&even)[4], F (&odd)[4]) {
    TILE_UNROLL for (int part = 0; part < 4; ++part) {
      const uint32_t before = mask & ((1u << 8 * part) - 1);
      decode4<D>(values + __builtin_popcount(before), mask >> 8 * part & 0xffu, even[part],
                 odd[part]);
    }
  }
};

bool available() { return true; }

}  // namespace

constexpr Path kNeonPath = path_of<Isa>("neon", available);

}  // namespace tiles
#endif
