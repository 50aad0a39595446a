// The same with AVX-512's vpexpandb and VNNI's vpdpbusd, in vectors of 256 bits. Included after
// integer_dots.h.

struct VnniProducts : ByteProducts {
  template <int32_t B>
  static constexpr int32_t offset = B == kCodes4 ? 8 : 128;  // codes become unsigned

  template <int32_t B>
  struct Sum {
    static constexpr int32_t kOffset = offset<B>;
    I wide;

    TILE_INLINE Sum() : wide(_mm256_setzero_si256()) {}
    TILE_INLINE void add(I codes, I x) { wide = _mm256_dpbusd_epi32(wide, codes, x); }
    TILE_INLINE I less(I excess) const { return _mm256_sub_epi32(wide, excess); }
  };

  template <int32_t B, int32_t K>
  static TILE_INLINE I next(const uint8_t*& values, const uint8_t* masks, int64_t kept) {
    const uint8_t* from = values;
    if constexpr (K == kKeptAll) {
      values += B == kCodes8 ? 32 : 16;
      return raised<offset<B>>(B == kCodes8 ? join(from, from + 16) : nibbles(from));
    } else {
      const Count n = count<K>(masks, kept);
      values += step_bytes(B, n.low, n.high);
      uint32_t mask;
      std::memcpy(&mask, masks, 4);
      if constexpr (B == kCodes8) {
        return raised<offset<B>>(_mm256_maskz_expand_epi8(mask, join(from, from + 16)));
      } else {
        const I packed = nibbles(from);
        const __m128i low = _mm_maskz_expand_epi8(static_cast<__mmask16>(mask & 0xffffu),
                                                  _mm256_castsi256_si128(packed));
        const __m128i high = _mm_maskz_expand_epi8(static_cast<__mmask16>(mask >> 16),
                                                   _mm256_extracti128_si256(packed, 1));
        return raised<offset<B>>(
            _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
      }
    }
  }
};
