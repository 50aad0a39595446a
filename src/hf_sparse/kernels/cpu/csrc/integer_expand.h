// The same with AVX-512's vpexpandb, in vectors of 256 bits. Included after integer_vnni.h.

struct ExpandProducts : VnniProducts {
  template <int32_t B>
  static TILE_INLINE I spread(const uint8_t* from, const uint8_t* masks, int64_t low) {
    if constexpr (B == kCodes8) {
      uint32_t mask;
      std::memcpy(&mask, masks, 4);
      return _mm256_maskz_expand_epi8(mask, join(from, from + 16));
    } else {  // two expansions of 16 bytes would take longer than the shuffle
      return VnniProducts::spread<B>(from, masks, low);
    }
  }

  template <int32_t B, int32_t K>
  static TILE_INLINE I next(const uint8_t*& values, const uint8_t* masks, int64_t kept) {
    return step<ExpandProducts, B, K>(values, masks, kept);
  }
};
