// int4 with AVX-512 VBMI: a pair's values to 32 words of bf16. Included after the target pragma by the
// two files whose instruction sets have it, see vector_path.h.
//
// vpmultishiftqb picks bytes at any bits of a qword, so that the nibbles of four qwords become 32
// bytes in one instruction, from an odd nibble on as well as from an even one. What is left in the
// top halves of the bytes doesn't matter: vpermw looks a word up by 5 bits, and the table repeats
// itself for the fifth. All 16 values are exact in bf16, and code 0, as what is not kept, gives 0.

alignas(64) constexpr uint16_t kInt4AsBf16[32] = {
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,   // 0 to 7
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,   // -8 to -1
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};

// The bits at which a qword's 8 nibbles begin, for an even and for an odd first nibble.
alignas(64) constexpr uint64_t kNibbleBits[2] = {0x1c1814100c080400, 0x201c1814100c0804};

// The same for two pairs, whose masks are the halves of `masks`: half as many loads and expansions.
TILE_INLINE void int4_words_of_two(Nibbles values, uint64_t masks, __m512i& first,
                                  __m512i& second) {
  const __m512i qwords = _mm512_permutexvar_epi32(
      _mm512_set_epi32(8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0),
      _mm512_loadu_si512(values.byte()));
  const __m512i bits = _mm512_set1_epi64(static_cast<long long>(kNibbleBits[values.odd() ? 1 : 0]));
  const __m512i nibbles =
      _mm512_maskz_expand_epi8(masks, _mm512_multishift_epi64_epi8(bits, qwords));
  const __m512i table = _mm512_load_si512(kInt4AsBf16);
  first = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(nibbles)), table);
  second =
      _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(nibbles, 1)), table);
}

TILE_INLINE __m512i int4_words(Nibbles values, uint32_t mask) {
  const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values.byte()));
  // Each qword gets 4 bytes, and one more for the last nibble of an odd beginning.
  const __m256i qwords =
      _mm256_permutexvar_epi32(_mm256_set_epi32(4, 3, 3, 2, 2, 1, 1, 0), loaded);
  const __m256i bits =
      _mm256_set1_epi64x(static_cast<long long>(kNibbleBits[values.odd() ? 1 : 0]));
  const __m256i nibbles =
      _mm256_maskz_expand_epi8(mask, _mm256_multishift_epi64_epi8(bits, qwords));
  return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(nibbles),
                                  _mm512_load_si512(kInt4AsBf16));
}
