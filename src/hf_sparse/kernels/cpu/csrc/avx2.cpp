// AVX2 with FMA and F16C (Haswell, Zen and later): 16 rows are two vectors of 8, and a pair's 32
// weights are four table shuffles of 8, two to a register.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

#include "byte_tables.h"
#include "convert.h"
#include "integer.h"
#include "tiles.h"
#include "target.h"

TILE_TARGET_BEGIN("avx2,fma,f16c,popcnt")
namespace tiles {
namespace {

#include "vector_path.h"
#include "x86_shuffle.h"

struct Isa : IsaDefaults, ByteShuffle {
  using F = __m256;
  static constexpr int V = 2;
  static constexpr int kAccumulators = 8;

  static TILE_INLINE F zero() { return _mm256_setzero_ps(); }
  static TILE_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static TILE_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static TILE_INLINE F set1(float a) { return _mm256_set1_ps(a); }
  static TILE_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static TILE_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static TILE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  static TILE_INLINE void load16(const void* p, int64_t i, int32_t dtype, float* out) {
    if (dtype == kF32) {
      std::memcpy(out, static_cast<const float*>(p) + i, 16 * sizeof(float));
      return;
    }
    for (int half = 0; half < 2; ++half) {
      const __m128i h = load128(static_cast<const uint16_t*>(p) + i + half * 8);
      store(out + half * 8,
            dtype == kF16
                ? _mm256_cvtph_ps(h)
                : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)));
    }
  }

  static TILE_INLINE void store16(void* p, int64_t i, int32_t dtype, const float* in) {
    if (dtype == kF32) {
      std::memcpy(static_cast<float*>(p) + i, in, 16 * sizeof(float));
    } else if (dtype == kF16) {
      for (int half = 0; half < 2; ++half) {
        const __m128i h = _mm256_cvtps_ph(load(in + half * 8),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + i + half * 8), h);
      }
    } else {
      for (int r = 0; r < 16; ++r) static_cast<uint16_t*>(p)[i + r] = to_bf16(in[r]);
    }
  }

  static TILE_INLINE __m256i join(const void* low, const void* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load128(low)), load128(high), 1);
  }

  // 16 words: those of the mask's low 8 bits, and of the next 8.
  static TILE_INLINE __m256i expand_words(const uint16_t* values, uint32_t mask) {
    const __m256i packed = join(values, values + __builtin_popcount(mask & 0xffu));
    return _mm256_shuffle_epi8(
        packed, join(kTables.words[mask & 0xffu], kTables.words[mask >> 8 & 0xffu]));
  }

  static TILE_INLINE __m128i expand_columns(const uint16_t* values, uint32_t mask) {
    return _mm_shuffle_epi8(load128(values), load128(kTables.columns[mask & 0xffu]));
  }

  template <class Pointer>
  static TILE_INLINE __m128i expand_bytes(Pointer values, uint32_t mask) {
    const auto* shuffle = reinterpret_cast<const __m128i*>(kTables.bytes[mask & 0xffu]);
    return _mm_shuffle_epi8(eight_bytes(values), _mm_loadl_epi64(shuffle));
  }

  // Words to the top halves of dwords: column 0 and column 1 of 8 rows.
  static TILE_INLINE void split_words(__m256i words, __m256i& even, __m256i& odd) {
    even = _mm256_slli_epi32(words, 16);
    odd = _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  }

  // 8 rows, from the mask's low 16 bits.
  template <int32_t D>
  static TILE_INLINE void decode8(Values<D> values, uint32_t mask, F& even, F& odd) {
    if constexpr (D == kF32) {
      const auto part = [&](int first, int second) TILE_INLINE_LAMBDA {
        const float* a = values + __builtin_popcount(mask & ((1u << 4 * first) - 1));
        const float* b = values + __builtin_popcount(mask & ((1u << 4 * second) - 1));
        const __m256i shuffle = join(kTables.dwords[mask >> 4 * first & 15u],
                                     kTables.dwords[mask >> 4 * second & 15u]);
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(join(a, b), shuffle));
      };
      // Rows (0 1 | 4 5) and (2 3 | 6 7): the in-lane shuffle then puts 0..7 in order.
      const F a = part(0, 2), b = part(1, 3);
      even = _mm256_shuffle_ps(a, b, 0x88);
      odd = _mm256_shuffle_ps(a, b, 0xdd);
    } else if constexpr (D == kBF16) {
      __m256i e, o;
      split_words(expand_words(values, mask), e, o);
      even = _mm256_castsi256_ps(e);
      odd = _mm256_castsi256_ps(o);
    } else if constexpr (D == kF16) {
      const __m128i a = expand_columns(values, mask);
      const __m128i b =
          expand_columns(values + __builtin_popcount(mask & 0xffu), mask >> 8);
      even = _mm256_cvtph_ps(_mm_unpacklo_epi64(a, b));
      odd = _mm256_cvtph_ps(_mm_unpackhi_epi64(a, b));
    } else {
      const __m128i a = expand_bytes(values, mask);
      const __m128i b = expand_bytes(values + __builtin_popcount(mask & 0xffu), mask >> 8);
      __m256i e, o;
      split_words(_mm256_cvtepi8_epi16(_mm_unpacklo_epi64(a, b)), e, o);
      even = _mm256_cvtepi32_ps(e);
      odd = _mm256_cvtepi32_ps(o);
    }
  }

  template <int32_t D>
  static TILE_INLINE void decode(Values<D> values, uint32_t mask, F (&even)[2], F (&odd)[2]) {
    decode8<D>(values, mask, even[0], odd[0]);
    decode8<D>(values + __builtin_popcount(mask & 0xffffu), mask >> 16, even[1], odd[1]);
  }
};

#include "integer_dots.h"
#include "integer_round.h"
#include "integer_walk.h"

constexpr IntegerPath kInteger = {round_x<Isa>, IntegerWalk<ByteProducts>::multiply};

bool available() {
  // clang's __builtin_cpu_supports doesn't know F16C: bit 29 of leaf 1's ecx.
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1u) != 0;
}

}  // namespace

constexpr Path kAvx2Path = path_of<Isa>("avx2", available, &kInteger);

}  // namespace tiles
TILE_TARGET_END
#endif
