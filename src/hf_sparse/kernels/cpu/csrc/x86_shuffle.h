// What the x86 paths that expand by byte shuffle share. Included after the target pragma, see
// vector_path.h.

struct ByteShuffle {
  static TILE_INLINE __m128i load128(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }

  // 8 values as bytes; int4 times 16.
  static TILE_INLINE __m128i eight_bytes(const int8_t* values) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
  }
  static TILE_INLINE __m128i eight_bytes(Nibbles values) {
    const EightNibbles eight = eight_nibbles(values);
    return _mm_unpacklo_epi8(_mm_cvtsi32_si128(static_cast<int>(eight.even)),
                             _mm_cvtsi32_si128(static_cast<int>(eight.odd)));
  }
};
