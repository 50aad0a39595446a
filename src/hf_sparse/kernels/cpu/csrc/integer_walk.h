// The integer products on vectors of 32 bytes, written once over a `Dot` that knows how a step is
// decoded and multiplied. Included inside an anonymous namespace, after vector_path.h.
//
// One token: each step is decoded in registers and multiplied at once. More tokens: a span of four
// tiles is decoded to 4 KB of scratch, and all tokens take it from there, four at a time.
//
// A Dot has:
//   next<bits, kept>(values, masks, count): the step at `values` as `add` takes it; moves `values` on
//   by the step's bytes. `count` codes of each octet are kept, if that is fixed.
//   Sum<bits>: of steps' products, over the units of a block at most; `less` takes off what codes have
//   too much in them.
//   offset<bits>: that is what was added to each code.

template <class Dot>
struct IntegerWalk {
  using I = __m256i;
  using F = __m256;
  static constexpr int64_t kTiles = 4;
  static constexpr int kTokens = 4;
  static constexpr int64_t kBlockUnits = kLargestBlock / kOctet;

  static TILE_INLINE F floats(const uint16_t* bf16) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  static TILE_INLINE I repeat8(const int8_t* q) {
    int64_t eight;
    std::memcpy(&eight, q, 8);
    return _mm256_set1_epi64x(eight);
  }

  // Sums of a span: rows 0-3 and 4-7, of each the halves of its octets.
  struct Halves {
    F low, high;

    TILE_INLINE Halves() : low(_mm256_setzero_ps()), high(_mm256_setzero_ps()) {}
  };

  template <class Sum>
  static TILE_INLINE void add_block(Halves& to, const Sum& low, const Sum& high,
                                    const RoundedBlock& block) {
    int64_t both;
    std::memcpy(&both, block.sums, 8);
    const I excess = _mm256_mullo_epi32(_mm256_set1_epi64x(both), _mm256_set1_epi32(Sum::kOffset));
    const F step = _mm256_set1_ps(block.step);
    to.low = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low.less(excess)), step, to.low);
    to.high = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high.less(excess)), step, to.high);
  }

  // total + scaled sums of a span, for 8 rows in order.
  static TILE_INLINE F add_span(F total, const Halves& sums, F scale) {
    // Rows (0 1 4 5 | 2 3 6 7) after the addition of neighbours.
    const __m256d rows = _mm256_castps_pd(_mm256_hadd_ps(sums.low, sums.high));
    return _mm256_fmadd_ps(_mm256_castpd_ps(_mm256_permute4x64_pd(rows, 0xd8)), scale, total);
  }

  static TILE_INLINE void store8(void* y, int64_t at, int32_t dtype, F a) {
    if (dtype == kF32) return _mm256_storeu_ps(static_cast<float*>(y) + at, a);
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

  static TILE_INLINE void store_rows(const IntegerProduct& p, int64_t tile, int64_t token, F sums) {
    if (p.bias) sums = _mm256_add_ps(sums, _mm256_loadu_ps(p.bias + tile * kOctet));
    const int64_t at = token * p.y_stride + tile * kOctet;
    const int64_t rows = min64(kOctet, p.weight->n - tile * kOctet);
    if (rows == kOctet) return store8(p.y, at, p.y_dtype, sums);
    float each[kOctet];
    _mm256_storeu_ps(each, sums);
    for (int64_t r = 0; r < rows; ++r) store_from_float(p.y, at + r, p.y_dtype, each[r]);
  }

  // ---- one token

  template <int32_t B, int32_t K>
  static void direct(const IntegerProduct& p, int64_t tile_begin, int64_t tile_end) {
    const IntegerWeight& w = *p.weight;
    const int64_t block_units = w.block_units();
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const uint8_t* values = w.tile_values(tile);
      const uint8_t* masks = K == kKeptAll ? values : w.tile_masks(tile);
      const int8_t* q = p.q;
      const RoundedBlock* block = p.blocks;
      F total = _mm256_setzero_ps();
      for (int64_t span = 0; span < w.spans(); ++span) {
        Halves sums;
        int64_t left = min64(w.span_units(), w.units() - span * w.span_units());
        for (; left > 0; left -= block_units, ++block) {
          typename Dot::template Sum<B> low, high;
          const auto unit = [&]() TILE_INLINE_LAMBDA {
            __builtin_prefetch(values + kPrefetchBytes);
            const I x = repeat8(q);
            low.add(Dot::template next<B, K>(values, masks, w.kept), x);
            high.add(Dot::template next<B, K>(values, masks + 4, w.kept), x);
            if (K != kKeptAll) masks += kOctet;
            q += kOctet;
          };
          if (K != kKeptAll) __builtin_prefetch(masks + kPrefetchBytes);
          const int64_t here = min64(left, block_units);
          if (here == kBlockUnits) {
            TILE_UNROLL for (int i = 0; i < kBlockUnits; ++i) unit();
          } else {
            for (int64_t i = 0; i < here; ++i) unit();
          }
          add_block(sums, low, high, *block);
        }
        total = add_span(total, sums, floats(w.span_scales(tile, span)));
      }
      store_rows(p, tile, 0, total);
    }
  }

  // ---- several tokens

  // totals[T][8] += a decoded span of one tile times q[T][span columns].
  template <int32_t B, int T>
  static void micro(const IntegerWeight& w, const I* steps, int64_t units, const int8_t* q,
                    const RoundedBlock* blocks, F scale, float* totals) {
    const int64_t q_stride = w.span_columns(), block_stride = w.span_blocks();
    Halves sums[T];
    while (units > 0) {
      const int64_t here = min64(units, w.block_units());
      typename Dot::template Sum<B> exact[T][2];
      for (int64_t u = 0; u < here; ++u, steps += 2, q += kOctet) {
        const I low = _mm256_load_si256(steps), high = _mm256_load_si256(steps + 1);
        TILE_UNROLL for (int t = 0; t < T; ++t) {
          const I x = repeat8(q + t * q_stride);
          exact[t][0].add(low, x);
          exact[t][1].add(high, x);
        }
      }
      TILE_UNROLL for (int t = 0; t < T; ++t) {
        add_block(sums[t], exact[t][0], exact[t][1], blocks[t * block_stride]);
      }
      units -= here;
      ++blocks;
    }
    TILE_UNROLL for (int t = 0; t < T; ++t) {
      float* to = totals + t * kOctet;
      _mm256_storeu_ps(to, add_span(_mm256_loadu_ps(to), sums[t], scale));
    }
  }

  template <int32_t B, int T>
  static TILE_INLINE void run_micro(int64_t tokens, const IntegerWeight& w, const I* steps,
                                   int64_t units, const int8_t* q, const RoundedBlock* blocks,
                                   F scale, float* totals) {
    if (tokens == T) {
      micro<B, T>(w, steps, units, q, blocks, scale, totals);
    } else if constexpr (T > 1) {
      run_micro<B, T - 1>(tokens, w, steps, units, q, blocks, scale, totals);
    }
  }

  template <int32_t B, int32_t K>
  static void blocked(const IntegerProduct& p, int64_t tile_begin, int64_t tile_end) {
    const IntegerWeight& w = *p.weight;
    const int64_t tile_steps = 2 * w.span_units();
    I* decoded = scratch_of<I>(kScratchTile, kTiles * tile_steps);
    float* totals = scratch_of<float>(kScratchSum, kTiles * p.m * kOctet);
    if (!decoded || !totals) return report_no_memory();
    for (int64_t first = tile_begin; first < tile_end; first += kTiles) {
      const int64_t tiles = min64(kTiles, tile_end - first);
      const uint8_t *values[kTiles], *masks[kTiles];
      for (int64_t t = 0; t < tiles; ++t) {
        values[t] = w.tile_values(first + t);
        masks[t] = K == kKeptAll ? values[t] : w.tile_masks(first + t);
      }
      std::memset(totals, 0, static_cast<size_t>(tiles * p.m * kOctet) * sizeof(float));
      for (int64_t span = 0; span < w.spans(); ++span) {
        const int64_t units = min64(w.span_units(), w.units() - span * w.span_units());
        for (int64_t t = 0; t < tiles; ++t) {
          I* to = decoded + t * tile_steps;
          for (int64_t u = 0; u < units; ++u, to += 2) {
            __builtin_prefetch(values[t] + kPrefetchBytes);
            _mm256_store_si256(to, Dot::template next<B, K>(values[t], masks[t], w.kept));
            _mm256_store_si256(to + 1, Dot::template next<B, K>(values[t], masks[t] + 4, w.kept));
            if (K != kKeptAll) masks[t] += kOctet;
          }
        }
        for (int64_t token = 0; token < p.m; token += kTokens) {
          for (int64_t t = 0; t < tiles; ++t) {
            run_micro<B, kTokens>(min64(kTokens, p.m - token), w, decoded + t * tile_steps, units,
                                  p.span_q(span, token), p.span_blocks(span, token),
                                  floats(w.span_scales(first + t, span)),
                                  totals + (t * p.m + token) * kOctet);
          }
        }
      }
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t m = 0; m < p.m; ++m) {
          store_rows(p, first + t, m, _mm256_loadu_ps(totals + (t * p.m + m) * kOctet));
        }
      }
    }
  }

  template <int32_t B, int32_t K>
  static void multiply_as(const IntegerProduct& p, int64_t tile_begin, int64_t tile_end) {
    p.m == 1 ? direct<B, K>(p, tile_begin, tile_end) : blocked<B, K>(p, tile_begin, tile_end);
  }

  template <int32_t B>
  static void multiply_bits(const IntegerProduct& p, int64_t tile_begin, int64_t tile_end) {
    switch (p.weight->kept) {
      case kKeptAny: return multiply_as<B, kKeptAny>(p, tile_begin, tile_end);
      case kKeptAll: return multiply_as<B, kKeptAll>(p, tile_begin, tile_end);
      default: return multiply_as<B, kKeptFixed>(p, tile_begin, tile_end);
    }
  }

  static void multiply(const IntegerProduct& p, int64_t tile_begin, int64_t tile_end) {
    p.weight->bits == kCodes8 ? multiply_bits<kCodes8>(p, tile_begin, tile_end)
                              : multiply_bits<kCodes4>(p, tile_begin, tile_end);
  }
};

template <class Isa>
void round_x(const IntegerProduct& p, int64_t begin, int64_t end) {
  round_tokens(p, begin, end, [](const void* x, int64_t i, int32_t dtype, float* out)
                                  TILE_INLINE_LAMBDA { Isa::load16(x, i, dtype, out); });
}
