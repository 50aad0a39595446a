// AVX-512 with VBMI2 and VNNI (Ice Lake, Zen 4 and later): vpexpandw and vpexpandb turn the 32 bits of a
// pair's mask into its 32 weights in one instruction, zeros in place.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "byte_tables.h"
#include "convert.h"
#include "integer.h"
#include "tiles.h"
#include "target.h"

TILE_TARGET_BEGIN(
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,f16c,popcnt")
namespace tiles {
namespace {

#include "vector_path.h"

#include "avx512_common.h"

#include "int4_vbmi.h"

struct Isa : Avx512 {
  static constexpr float kInt4Unit = 1.0f;

  template <int32_t D>
  static constexpr bool kDecodesTwo = D == kI4;

  static TILE_INLINE void decode_two(Nibbles values, uint64_t masks, F (&even)[2][1],
                                    F (&odd)[2][1]) {
    __m512i first, second;
    int4_words_of_two(values, masks, first, second);
    bf16_columns(first, even[0][0], odd[0][0]);
    bf16_columns(second, even[1][0], odd[1][0]);
  }

  static TILE_INLINE __m512i expand_words(const uint16_t* values, uint32_t mask) {
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
  }

  template <int32_t D>
  static TILE_INLINE void decode(Values<D> values, uint32_t mask, F (&even)[1], F (&odd)[1]) {
    if constexpr (D == kF32) {
      fp32_columns(values, mask, even[0], odd[0]);
    } else if constexpr (D == kBF16) {
      bf16_columns(expand_words(values, mask), even[0], odd[0]);
    } else if constexpr (D == kF16) {
      // Column 0's words to the lower half, column 1's to the upper one.
      const __m512i pick = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3,
                                            1, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4,
                                            2, 0);
      const __m512i words = _mm512_permutexvar_epi16(pick, expand_words(values, mask));
      even[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
      odd[0] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
    } else if constexpr (D == kI4) {
      bf16_columns(int4_words(values, mask), even[0], odd[0]);
    } else {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
      int8_columns(_mm256_maskz_expand_epi8(mask, bytes), even[0], odd[0]);
    }
  }
};

#include "integer_dots.h"
#include "integer_round.h"
#include "integer_vnni.h"
#include "integer_expand.h"
#include "integer_walk.h"

constexpr IntegerPath kInteger = {round_x<Isa>, IntegerWalk<ExpandProducts>::multiply};

bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace

constexpr Path kAvx512Vbmi2Path = path_of<Isa>("avx512-vbmi2", available, &kInteger);

}  // namespace tiles
TILE_TARGET_END
#endif
