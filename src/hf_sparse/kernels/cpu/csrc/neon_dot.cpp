// NEON's dot product of bytes (Armv8.2 with FEAT_DotProd: Apple's M1, Graviton 2, Cortex-A76 and
// later): NEON's path with sdot for codes and rounded activations.
#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstring>

#include "byte_tables.h"
#include "convert.h"
#include "integer.h"
#include "tiles.h"
#include "target.h"

#if defined(__clang__)
TILE_TARGET_BEGIN("dotprod")
#else
TILE_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif
namespace tiles {
namespace {

#include "vector_path.h"
#include "integer_round.h"
#include "integer_walk.h"

// Two registers for what others have in one. Codes keep their sign.
struct DotProducts {
  struct I {
    int8x16_t low, high;
  };
  struct F {
    float32x4_t low, high;
  };

  static TILE_INLINE F set1(float a) { return {vdupq_n_f32(a), vdupq_n_f32(a)}; }
  static TILE_INLINE F zero() { return set1(0.0f); }
  static TILE_INLINE F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static TILE_INLINE void store(float* p, F a) {
    vst1q_f32(p, a.low);
    vst1q_f32(p + 4, a.high);
  }
  static TILE_INLINE F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static TILE_INLINE F fma(F a, F b, F c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  static TILE_INLINE F floats(const uint16_t* bf16) {
    const uint16x8_t half = vld1q_u16(bf16);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(half), 16))};
  }
  static TILE_INLINE I repeat8(const int8_t* q) {
    const int8x8_t eight = vld1_s8(q);
    const int8x16_t twice = vcombine_s8(eight, eight);
    return {twice, twice};
  }
  static TILE_INLINE F in_order(F rows) { return rows; }
  static TILE_INLINE void store8(void* y, int64_t at, int32_t dtype, F a) {
    if (dtype == kF32) return store(static_cast<float*>(y) + at, a);
    auto* to = static_cast<uint16_t*>(y) + at;
    if (dtype == kF16) {
      vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(a.low)));
      return vst1_u16(to + 4, vreinterpret_u16_f16(vcvt_f16_f32(a.high)));
    }
    float each[kOctet];
    store(each, a);
    for (int64_t r = 0; r < kOctet; ++r) to[r] = to_bf16(each[r]);
  }

  template <int32_t B>
  struct Sum {
    int32x4_t low, high;

    TILE_INLINE Sum() : low(vdupq_n_s32(0)), high(vdupq_n_s32(0)) {}
    TILE_INLINE void add(I codes, I x) {
      low = vdotq_s32(low, codes.low, x.low);
      high = vdotq_s32(high, codes.high, x.high);
    }
  };

  template <int32_t B>
  static TILE_INLINE F rows(const Sum<B>& low, const Sum<B>& high, const RoundedBlock&) {
    return {vcvtq_f32_s32(vpaddq_s32(low.low, low.high)),
            vcvtq_f32_s32(vpaddq_s32(high.low, high.high))};
  }

  static TILE_INLINE int8x16_t load16(const uint8_t* p) {
    return vreinterpretq_s8_u8(vld1q_u8(p));
  }
  // A step's codes side by side; `count` of them are of its first two octets.
  template <int32_t B>
  static TILE_INLINE I packed(const uint8_t* from, int64_t count) {
    if constexpr (B == kCodes8) {
      return {load16(from), load16(from + count)};
    } else {
      const int8x16_t both = load16(from);
      return {vshrq_n_s8(vshlq_n_s8(both, 4), 4), vshrq_n_s8(both, 4)};
    }
  }
  static TILE_INLINE int8x16_t spread(int8x16_t codes, const uint8_t* masks) {
    return vqtbl1q_s8(codes, vaddq_u8(vld1q_u8(kTables.first[masks[0]]),
                                      vld1q_u8(kTables.second[masks[1]])));
  }

  template <int32_t B, int32_t K>
  static TILE_INLINE I next(const uint8_t*& values, const uint8_t* masks, int64_t kept) {
    const uint8_t* from = values;
    if constexpr (K == kKeptAll) {
      values += B == kCodes8 ? 32 : 16;
      return packed<B>(from, 16);
    } else {
      int64_t low = 2 * kept, high = low;
      if constexpr (K != kKeptFixed) {
        low = __builtin_popcount(masks[0]) + __builtin_popcount(masks[1]);
        high = __builtin_popcount(masks[2]) + __builtin_popcount(masks[3]);
      }
      values += step_bytes(B, low, high);
      const I codes = packed<B>(from, low);
      return {spread(codes.low, masks), spread(codes.high, masks + 2)};
    }
  }
};

void round_x(const IntegerProduct& p, int64_t begin, int64_t end) {
  round_tokens(p, begin, end, [](const void* x, int64_t i, int32_t dtype, float* out) {
    for (int64_t j = 0; j < 16; ++j) out[j] = load_as_float(x, i + j, dtype);
  });
}

constexpr IntegerPath kInteger = {round_x, IntegerWalk<DotProducts>::multiply};

bool available() {
#if defined(__APPLE__)
  return true;
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) >> 20 & 1u) != 0;  // HWCAP_ASIMDDP
#else
  return false;
#endif
}

}  // namespace
}  // namespace tiles
TILE_TARGET_END

namespace tiles {

const Path kNeonDotPath = with_integers(kNeonPath, "neon-dot", available, &kInteger);

}  // namespace tiles
#endif
