// The loops of whole_weight.h. Included after the target pragma, in a namespace without a name, with
// WHOLE_AVX2 defined where its instructions may be used.

// Floats in their order as unsigned numbers: both zeros are one.
inline uint32_t rank_of(float score) {
  const uint32_t u = bits_of(score + 0.0f);
  return u ^ (static_cast<uint32_t>(static_cast<int32_t>(u) >> 31) | 0x80000000u);
}

constexpr int64_t kRankBlock = 512;

inline void ranks_of(const float* scores, int64_t n, uint32_t* ranks) {
  for (int64_t i = 0; i < n; ++i) ranks[i] = rank_of(scores[i]);
}

// The digit of the left-th lowest number; `left` is then its place among those of the same digit.
inline uint32_t find_digit(const uint32_t* counts, int64_t& left) {
  uint32_t digit = 0;
  for (; left > counts[digit]; ++digit) left -= counts[digit];
  return digit;
}

void keep_highest(const float* scores, int64_t n, int64_t drop, uint8_t* mask) {
  uint32_t ranks[kRankBlock];
  // Neighbours are often alike: counters of their own spare waiting for the last store.
  uint32_t counts[4][kDigits] = {};
  for (int64_t start = 0; start < n; start += kRankBlock) {
    const int64_t size = min64(kRankBlock, n - start);
    ranks_of(scores + start, size, ranks);
    for (int64_t i = 0; i < size; ++i) ++counts[i & 3][ranks[i] >> 21];
  }
  for (int64_t d = 0; d < kDigits; ++d) counts[0][d] += counts[1][d] + counts[2][d] + counts[3][d];
  int64_t left = drop;
  uint32_t limit = find_digit(counts[0], left);
  // The ranks of that digit, some twentieth of all: among them is the highest that goes.
  std::vector<uint32_t> near(counts[0][limit] + 1);
  int64_t found = 0;
  for (int64_t start = 0; start < n; start += kRankBlock) {
    const int64_t size = min64(kRankBlock, n - start);
    ranks_of(scores + start, size, ranks);
    for (int64_t i = 0; i < size; ++i) {
      near[static_cast<size_t>(found)] = ranks[i];
      found += ranks[i] >> 21 == limit;
    }
  }
  for (const int shift : {10, 0}) {
    const int above = shift == 0 ? 10 : 21;
    std::memset(counts[0], 0, sizeof counts[0]);
    for (int64_t i = 0; i < found; ++i) {
      const uint32_t rank = near[static_cast<size_t>(i)];
      if (rank >> above == limit) ++counts[0][rank >> shift & ((1u << (above - shift)) - 1)];
    }
    limit = limit << (above - shift) | find_digit(counts[0], left);
  }
  constexpr int64_t kTies = 32;
  for (int64_t start = 0; start < n; start += kRankBlock) {
    const int64_t size = min64(kRankBlock, n - start);
    uint8_t* to = mask + start;
    ranks_of(scores + start, size, ranks);
    for (int64_t i = 0; i < size; ++i) to[i] = ranks[i] > limit;
    for (int64_t first = 0; first < size; first += kTies) {
      const int64_t last = min64(first + kTies, size);
      uint32_t ties = 0;
      for (int64_t i = first; i < last; ++i) ties |= ranks[i] == limit;
      for (int64_t i = first; ties && i < last; ++i) {
        if (ranks[i] == limit) to[i] = --left < 0;
      }
    }
  }
}

template <int kWidth>
void keep_highest_of(const float* scores, int64_t rows, int64_t n, int64_t drop, uint8_t* mask) {
  const int64_t width = kWidth ? kWidth : n;
  for (int64_t row = 0; row < rows; ++row, scores += width, mask += width) {
    for (int64_t i = 0; i < width; ++i) {
      int64_t below = 0;
      for (int64_t j = 0; j < width; ++j) {
        below += (scores[j] < scores[i]) | ((scores[j] == scores[i]) & (j < i));
      }
      mask[i] = below >= drop;
    }
  }
}

void keep_highest_short(const float* scores, int64_t rows, int64_t n, int64_t drop, uint8_t* mask) {
  switch (n) {
    case 4: return keep_highest_of<4>(scores, rows, n, drop, mask);
    case 8: return keep_highest_of<8>(scores, rows, n, drop, mask);
    default: return keep_highest_of<0>(scores, rows, n, drop, mask);
  }
}

template <class T>
uint8_t byte_of(const T* items, int64_t count, int drop) {
  uint32_t byte = 0;
  for (int64_t i = 0; i < count; ++i) {
    byte |= static_cast<uint32_t>(static_cast<T>(items[i] << drop) != 0) << i;
  }
  return static_cast<uint8_t>(byte);
}

#if defined(WHOLE_AVX2)
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline int zeros_of_8(const uint32_t* items, int drop) {
  const __m256i shifted = _mm256_sll_epi32(load256(items), _mm_cvtsi32_si128(drop));
  return _mm256_movemask_ps(
      _mm256_castsi256_ps(_mm256_cmpeq_epi32(shifted, _mm256_setzero_si256())));
}
inline int zeros_of_8(const uint16_t* items, int drop) {
  const __m128i shifted = _mm_sll_epi16(load128(items), _mm_cvtsi32_si128(drop));
  const __m128i zero = _mm_cmpeq_epi16(shifted, _mm_setzero_si128());
  return _mm_movemask_epi8(_mm_packs_epi16(zero, zero)) & 255;
}
template <>
uint8_t byte_of<uint16_t>(const uint16_t* items, int64_t count, int drop) {
  if (count == 8) return static_cast<uint8_t>(~zeros_of_8(items, drop));
  uint16_t padded[8] = {};
  std::memcpy(padded, items, static_cast<size_t>(count) * sizeof *items);
  return static_cast<uint8_t>(~zeros_of_8(padded, drop));
}
template <>
uint8_t byte_of<uint32_t>(const uint32_t* items, int64_t count, int drop) {
  if (count == 8) return static_cast<uint8_t>(~zeros_of_8(items, drop));
  uint32_t padded[8] = {};
  std::memcpy(padded, items, static_cast<size_t>(count) * sizeof *items);
  return static_cast<uint8_t>(~zeros_of_8(padded, drop));
}
#endif

template <class T>
void nonzero_bits(const void* row, int64_t k, bool sign, uint8_t* bits) {
  const auto* items = static_cast<const T*>(row);
  for (int64_t i = 0; i < k; i += 8) *bits++ = byte_of<T>(items + i, min64(8, k - i), sign ? 1 : 0);
}

// Of 8 items those whose bit is set; their number. Writes 8 items.
template <class T>
void keep_8(const T* items, uint32_t byte, T* out) {
  for (; byte; byte &= byte - 1) *out++ = items[__builtin_ctz(byte)];
}

#if defined(WHOLE_AVX2)
template <>
void keep_8<uint16_t>(const uint16_t* items, uint32_t byte, uint16_t* out) {
  const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kKept.places[byte]));
  const __m128i twice = _mm_add_epi8(places, places);
  const __m128i bytes = _mm_unpacklo_epi8(twice, _mm_add_epi8(twice, _mm_set1_epi8(1)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(load128(items), bytes));
}
template <>
void keep_8<uint32_t>(const uint32_t* items, uint32_t byte, uint32_t* out) {
  const __m256i places = _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kKept.places[byte])));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_permutevar8x32_epi32(load256(items), places));
}
#endif

template <class T>
void kept_items(const void* row, int64_t k, const uint8_t* bits, int64_t count, void* to) {
  const auto* items = static_cast<const T*>(row);
  auto* out = static_cast<T*>(to);
  T* const end = out + count;
  int64_t i = 0;
  for (; i + 8 <= k && out + 8 <= end; i += 8) {
    const uint32_t byte = bits[i / 8];
    keep_8<T>(items + i, byte, out);
    out += __builtin_popcount(byte);
  }
  for (; i < k; i += 8) {
    for (uint32_t byte = bits[i / 8]; byte; byte &= byte - 1) *out++ = items[i + __builtin_ctz(byte)];
  }
}

template <class T>
void zero_outside(const void* items, const uint8_t* mask, int64_t count, void* out) {
  for (int64_t i = 0; i < count; ++i) {
    const auto kept = static_cast<T>(T{0} - static_cast<T>(mask[i]));
    static_cast<T*>(out)[i] = static_cast<T>(static_cast<const T*>(items)[i] & kept);
  }
}

void rounding_errors(const float* values, int64_t width, float scale, float low, float high,
                     const float* importance, float* out) {
  for (int64_t i = 0; i < width; ++i) {
    const float code = __builtin_rintf(values[i] / scale);
    out[i] = (code < low ? low : code > high ? high : code) * scale;
  }
  // A loop of its own: no compiler makes one operation, rounded once, of product and difference.
  for (int64_t i = 0; i < width; ++i) {
    const float error = out[i] - values[i];
    out[i] = error * error;
  }
  for (int64_t i = 0; importance && i < width; ++i) out[i] *= importance[i];
}

template <class T>
bool any_at_least(const void* items, int64_t count, uint32_t limit) {
  const auto unsign = static_cast<T>(static_cast<T>(~T{0}) >> 1);
  T most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto item = static_cast<T>(static_cast<const T*>(items)[i] & unsign);
    most = item > most ? item : most;
  }
  return most >= limit;
}

constexpr WholeLoops kLoops = {
    keep_highest,
    keep_highest_short,
    {nonzero_bits<uint8_t>, nonzero_bits<uint16_t>, nonzero_bits<uint32_t>, nonzero_bits<uint64_t>},
    {kept_items<uint8_t>, kept_items<uint16_t>, kept_items<uint32_t>, kept_items<uint64_t>},
    {zero_outside<uint8_t>, zero_outside<uint16_t>, zero_outside<uint32_t>, zero_outside<uint64_t>},
    rounding_errors,
    {any_at_least<uint16_t>, any_at_least<uint32_t>},
};
