// The same with VNNI's vpdpbusd, of AVX-512 or of AVX. Included after integer_dots.h.

struct VnniProducts : ByteProducts {
  template <int32_t B>
  static constexpr int32_t offset = B == kCodes4 ? 8 : 128;  // codes become unsigned

  template <int32_t B>
  struct Sum {
    I wide;

    TILE_INLINE Sum() : wide(_mm256_setzero_si256()) {}
    TILE_INLINE void add(I codes, I x) { wide = _mm256_dpbusd_epi32(wide, codes, x); }
  };

  template <int32_t B>
  static TILE_INLINE F rows(const Sum<B>& low, const Sum<B>& high, const RoundedBlock& block) {
    return less(neighbours(low.wide, high.wide), block, offset<B>);
  }

  template <int32_t B, int32_t K>
  static TILE_INLINE I next(const uint8_t*& values, const uint8_t* masks, int64_t kept) {
    return step<VnniProducts, B, K>(values, masks, kept);
  }
};
