// How 256-bit instruction sets decode a step of the integer layout and multiply it, see
// integer_walk.h. Included inside an anonymous namespace, after vector_path.h.

struct Bytes256 {
  using I = __m256i;
  using F = __m256;

  static TILE_INLINE F zero() { return _mm256_setzero_ps(); }
  static TILE_INLINE F set1(float a) { return _mm256_set1_ps(a); }
  static TILE_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static TILE_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static TILE_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static TILE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  static TILE_INLINE F floats(const uint16_t* bf16) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  static TILE_INLINE I repeat8(const int8_t* q) {
    int64_t eight;
    std::memcpy(&eight, q, 8);
    return _mm256_set1_epi64x(eight);
  }

  // Sums of rows 0-3 and 4-7 become those of rows 0 1 4 5 2 3 6 7.
  static TILE_INLINE I neighbours(I low, I high) { return _mm256_hadd_epi32(low, high); }
  static TILE_INLINE F in_order(F rows) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(rows), 0xd8));
  }
  // Exact sums, less what `offset` more in each code added to them.
  static TILE_INLINE F less(I sums, const RoundedBlock& block, int32_t offset) {
    if (offset != 0) sums = _mm256_sub_epi32(sums, _mm256_set1_epi32(block.sum * offset));
    return _mm256_cvtepi32_ps(sums);
  }

  static TILE_INLINE void store8(void* y, int64_t at, int32_t dtype, F a) {
    if (dtype == kF32) return store(static_cast<float*>(y) + at, a);
    auto* to = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(y) + at);
    if (dtype == kF16) {
      return _mm_storeu_si128(to, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    const I u = _mm256_castps_si256(a);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const I even = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const I nan = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const I is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const I top = _mm256_srli_epi32(_mm256_blendv_epi8(even, nan, is_nan), 16);
    const I both = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0xd8);
    _mm_storeu_si128(to, _mm256_castsi256_si128(both));
  }
};

struct ByteProducts : Bytes256 {

  // Codes of 4 bits become 0 to 15, and the sum of a pair's products fits 16 bits 8 times over. Those
  // of 8 bits keep their sign, which is handed to x.
  template <int32_t B>
  static constexpr int32_t offset = B == kCodes4 ? 8 : 0;

  template <int32_t B>
  struct Sum {
    I wide, narrow;

    // Said, because GCC gives an implied one no target.
    TILE_INLINE Sum() : wide(_mm256_setzero_si256()), narrow(_mm256_setzero_si256()) {}
    static TILE_INLINE I widened(I pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
    TILE_INLINE void add(I codes, I x) {
      if constexpr (B == kCodes4) {
        narrow = in_turn(_mm256_add_epi16(narrow, _mm256_maddubs_epi16(codes, x)));
      } else {
        const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
        wide = in_turn(_mm256_add_epi32(wide, widened(pairs)));
      }
    }
    // Has the compiler add one product after another: in a tree, they would wait on the stack.
    static TILE_INLINE I in_turn(I sum) {
      asm("" : "+x"(sum));
      return sum;
    }
    TILE_INLINE I total() const { return B == kCodes4 ? widened(narrow) : wide; }
  };

  template <int32_t B>
  static TILE_INLINE F rows(const Sum<B>& low, const Sum<B>& high, const RoundedBlock& block) {
    return less(neighbours(low.total(), high.total()), block, offset<B>);
  }

  static TILE_INLINE __m128i load128(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static TILE_INLINE I join(const void* low, const void* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load128(low)), load128(high), 1);
  }
  // The low nibbles of 16 bytes, then the high ones.
  static TILE_INLINE I nibbles(const uint8_t* values) {
    const I shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    const I twice = _mm256_broadcastsi128_si256(load128(values));
    return _mm256_and_si256(_mm256_srlv_epi32(twice, shifts), _mm256_set1_epi8(15));
  }
  // Two's complement to what is `offset` more.
  template <int32_t Offset>
  static TILE_INLINE I raised(I codes) {
    return Offset == 0 ? codes
                       : _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(Offset)));
  }

  // Codes kept in the first two octets of a step, and in the others.
  struct Count {
    int64_t low, high;
  };
  // Bits of two masks. They are widened where GCC can't see it: it would count them in a half of a
  // register, and so wait for what that held before.
  static TILE_INLINE int64_t count16(const uint8_t* masks) {
    uint16_t both;
    std::memcpy(&both, masks, 2);
    uint32_t wide = both;
    asm("" : "+r"(wide));
    return __builtin_popcount(wide);
  }
  template <int32_t K>
  static TILE_INLINE Count count(const uint8_t* masks, int64_t kept) {
    if (K == kKeptFixed) return {2 * kept, 2 * kept};
    return {count16(masks), count16(masks + 2)};
  }

  // A step's codes at their columns; `low` of them are of its first two octets.
  template <int32_t B>
  static TILE_INLINE I spread(const uint8_t* from, const uint8_t* masks, int64_t low) {
    const I packed = B == kCodes8 ? join(from, from + low) : nibbles(from);
    const I shuffle = _mm256_add_epi8(join(kTables.first[masks[0]], kTables.first[masks[2]]),
                                      join(kTables.second[masks[1]], kTables.second[masks[3]]));
    return _mm256_shuffle_epi8(packed, shuffle);
  }

  template <int32_t B, int32_t K>
  static TILE_INLINE I next(const uint8_t*& values, const uint8_t* masks, int64_t kept) {
    return step<ByteProducts, B, K>(values, masks, kept);
  }

 protected:
  // `next` with the offset and the `spread` of Path.
  template <class Path, int32_t B, int32_t K>
  static TILE_INLINE I step(const uint8_t*& values, const uint8_t* masks, int64_t kept) {
    constexpr int32_t kOffset = Path::template offset<B>;
    const uint8_t* from = values;
    if constexpr (K == kKeptAll) {
      values += B == kCodes8 ? 32 : 16;
      return raised<kOffset>(B == kCodes8 ? join(from, from + 16) : nibbles(from));
    } else {
      const Count n = count<K>(masks, kept);
      values += step_bytes(B, n.low, n.high);
      return raised<kOffset>(Path::template spread<B>(from, masks, n.low));
    }
  }
};
