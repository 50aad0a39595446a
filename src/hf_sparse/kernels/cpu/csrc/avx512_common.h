// What the AVX-512 paths share: 16 rows are one vector, and 24 accumulators leave room for the rest.
// Included after the target pragma, see vector_path.h.

struct Avx512 : IsaDefaults {
  using F = __m512;
  static constexpr int V = 1;
  static constexpr int kAccumulators = 24;
  static constexpr int64_t kMaxDirect = 12;
  static constexpr int kMicroTiles = 2;
  static constexpr int kMicroTokens = 12;

  static TILE_INLINE F zero() { return _mm512_setzero_ps(); }
  static TILE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static TILE_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static TILE_INLINE F set1(float a) { return _mm512_set1_ps(a); }
  static TILE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static TILE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static TILE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  static TILE_INLINE void load16(const void* p, int64_t i, int32_t dtype, float* out) {
    if (dtype == kF32) {
      std::memcpy(out, static_cast<const float*>(p) + i, 16 * sizeof(float));
      return;
    }
    const __m256i h = _mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i));
    store(out, dtype == kF16
                   ? _mm512_cvtph_ps(h)
                   : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)));
  }

  static TILE_INLINE void store16(void* p, int64_t i, int32_t dtype, const float* in) {
    const F f = load(in);
    if (dtype == kF32) return store(static_cast<float*>(p) + i, f);
    __m256i h;
    if (dtype == kF16) {
      h = _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      // Round to nearest even, as to_bf16; a NaN keeps its top bits and becomes quiet.
      const __m512i u = _mm512_castps_si512(f);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
      const __m512i rounded =
          _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
      const __m512i all =
          _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
      h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + i), h);
  }

  // Dwords of (column 0, column 1) words -> the words as the top halves of 16 + 16 dwords.
  static TILE_INLINE void split_words(__m512i words, __m512i& even, __m512i& odd) {
    even = _mm512_slli_epi32(words, 16);
    odd = _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  }

  static TILE_INLINE void bf16_columns(__m512i words, F& even, F& odd) {
    __m512i e, o;
    split_words(words, e, o);
    even = _mm512_castsi512_ps(e);
    odd = _mm512_castsi512_ps(o);
  }

  // Bytes as words; their value in the top halves is 2^16 times too large, which kInt8Unit undoes.
  static TILE_INLINE void int8_columns(__m256i bytes, F& even, F& odd) {
    __m512i e, o;
    split_words(_mm512_cvtepi8_epi16(bytes), e, o);
    even = _mm512_cvtepi32_ps(e);
    odd = _mm512_cvtepi32_ps(o);
  }

  static TILE_INLINE void fp32_columns(const float* values, uint32_t mask, F& even, F& odd) {
    const uint32_t low = mask & 0xffffu;
    const F a = _mm512_maskz_expand_ps(static_cast<__mmask16>(low), load(values));
    const F b = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask >> 16),
                                       load(values + __builtin_popcount(low)));
    const __m512i pick =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    even = _mm512_permutex2var_ps(a, pick, b);
    odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(pick, _mm512_set1_epi32(1)), b);
  }
};
