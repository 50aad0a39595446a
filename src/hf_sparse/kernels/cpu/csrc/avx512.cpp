// AVX-512 without VBMI2 (Skylake-SP, Cascade Lake): 16-bit and 8-bit values have no vpexpand. Four
// table shuffles side by side cost less there than widening to dwords, two vpexpandd and the
// permutes that put the rows in order again.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "byte_tables.h"
#include "convert.h"
#include "tiles.h"
#include "target.h"

TILE_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,popcnt")
namespace tiles {
namespace {

#include "vector_path.h"

#include "avx512_common.h"
#include "x86_shuffle.h"

struct Isa : Avx512, ByteShuffle {
  static TILE_INLINE __m512i join(const void* a, const void* b, const void* c, const void* d) {
    const __m512i ab = _mm512_inserti32x4(_mm512_castsi128_si512(load128(a)), load128(b), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(ab, load128(c), 2), load128(d), 3);
  }

  static TILE_INLINE __m512i expand_words(const uint16_t* values, uint32_t mask,
                                         const uint8_t (&table)[256][16]) {
    const __m512i packed = join(values, values + __builtin_popcount(mask & 0xffu),
                                values + __builtin_popcount(mask & 0xffffu),
                                values + __builtin_popcount(mask & 0xffffffu));
    const __m512i shuffle = join(table[mask & 0xffu], table[mask >> 8 & 0xffu],
                                 table[mask >> 16 & 0xffu], table[mask >> 24]);
    return _mm512_shuffle_epi8(packed, shuffle);
  }

  // Two masks of 8 bits -> 16 bytes.
  template <class Pointer>
  static TILE_INLINE __m128i expand_bytes(Pointer values, uint32_t mask) {
    const auto* low_shuffle = reinterpret_cast<const __m128i*>(kTables.bytes[mask & 0xffu]);
    const auto* high_shuffle = reinterpret_cast<const __m128i*>(kTables.bytes[mask >> 8 & 0xffu]);
    return _mm_unpacklo_epi64(
        _mm_shuffle_epi8(eight_bytes(values), _mm_loadl_epi64(low_shuffle)),
        _mm_shuffle_epi8(eight_bytes(values + __builtin_popcount(mask & 0xffu)),
                         _mm_loadl_epi64(high_shuffle)));
  }

  template <int32_t D>
  static TILE_INLINE void decode(Values<D> values, uint32_t mask, F (&even)[1], F (&odd)[1]) {
    if constexpr (D == kF32) {
      fp32_columns(values, mask, even[0], odd[0]);
    } else if constexpr (D == kBF16) {
      bf16_columns(expand_words(values, mask, kTables.words), even[0], odd[0]);
    } else if constexpr (D == kF16) {
      // Each 16 bytes hold four rows of column 0, then of column 1: gather the halves.
      const __m512i words =
          _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0),
                                   expand_words(values, mask, kTables.columns));
      even[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
      odd[0] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
    } else {
      const __m128i low = expand_bytes(values, mask & 0xffffu);
      const __m128i high =
          expand_bytes(values + __builtin_popcount(mask & 0xffffu), mask >> 16);
      int8_columns(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), even[0], odd[0]);
    }
  }
};

bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace

constexpr Path kAvx512Path = path_of<Isa>("avx512", available);

}  // namespace tiles
TILE_TARGET_END
#endif
