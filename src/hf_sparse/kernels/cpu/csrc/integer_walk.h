// The integer products on vectors of 32 bytes, written once over a `Dot` that knows how a step is
// decoded and multiplied. Included inside an anonymous namespace, after vector_path.h.
//
// One token: each step is decoded in registers and multiplied at once. More tokens: a block of four
// tiles is decoded to 4 KB of scratch, and all tokens take it from there, four at a time.
//
// A Dot has:
//   next<bits, kept>(values, masks, count): the step at `values` as `add` takes it; moves `values` on
//   by the step's bytes. `count` codes of each octet are kept, if that is fixed.
//   Sum<bits>: of a step's products, over at most kFlush units between two calls of `flush`.
//   offset<bits>: what was added to each code.

constexpr int64_t kFlushUnits = 8;

template <class Dot>
struct IntegerWalk {
  using I = __m256i;
  using F = __m256;
  static constexpr int64_t kTiles = 4;
  static constexpr int kTokens = 4;

  static TILE_INLINE F floats(const uint16_t* bf16) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  static TILE_INLINE I repeat8(const int8_t* q) {
    int64_t eight;
    std::memcpy(&eight, q, 8);
    return _mm256_set1_epi64x(eight);
  }

  // total + scaled sums of a block, for 8 rows in order.
  template <int32_t B>
  static TILE_INLINE F add_block(F total, I low, I high, F scale, float step, int32_t sum) {
    // Rows (0 1 4 5 | 2 3 6 7) after the addition of neighbours.
    const I rows = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
    const I exact = _mm256_sub_epi32(rows, _mm256_set1_epi32(Dot::template offset<B> * sum));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), _mm256_mul_ps(scale, _mm256_set1_ps(step)),
                           total);
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
      F total = _mm256_setzero_ps();
      int64_t left = w.units();
      for (int64_t block = 0; left > 0; ++block, left -= block_units) {
        typename Dot::template Sum<B> low, high;
        const int8_t* q = p.block_q(block);
        const auto unit = [&]() TILE_INLINE_LAMBDA {
          const I x = repeat8(q);
          low.add(Dot::template next<B, K>(values, masks, w.kept), x);
          high.add(Dot::template next<B, K>(values, masks + 4, w.kept), x);
          if (K != kKeptAll) masks += kOctet;
          q += kOctet;
        };
        int64_t here = min64(left, block_units);
        for (; here >= kFlushUnits; here -= kFlushUnits) {
          if (K != kKeptAll) __builtin_prefetch(masks + kPrefetchBytes);
          TILE_UNROLL for (int i = 0; i < kFlushUnits; ++i) {
            __builtin_prefetch(values + kPrefetchBytes);
            unit();
          }
          low.flush();
          high.flush();
        }
        for (; here > 0; --here) unit();
        low.flush();
        high.flush();
        total = add_block<B>(total, low.wide, high.wide, floats(w.block_scales(tile, block)),
                             p.steps[block], p.sums[block]);
      }
      store_rows(p, tile, 0, total);
    }
  }

  // ---- several tokens

  // totals[T][8] += a decoded block of one tile times q[T][block columns].
  template <int32_t B, int T>
  static void micro(const I* steps, int64_t units, const int8_t* q, int64_t q_stride, F scale,
                    const float* x_steps, const int32_t* x_sums, float* totals) {
    typename Dot::template Sum<B> sums[T][2];
    while (units > 0) {
      const int64_t here = min64(units, kFlushUnits);
      for (int64_t u = 0; u < here; ++u, steps += 2, q += kOctet) {
        const I low = _mm256_load_si256(steps), high = _mm256_load_si256(steps + 1);
        TILE_UNROLL for (int t = 0; t < T; ++t) {
          const I x = repeat8(q + t * q_stride);
          sums[t][0].add(low, x);
          sums[t][1].add(high, x);
        }
      }
      TILE_UNROLL for (int t = 0; t < T; ++t) {
        sums[t][0].flush();
        sums[t][1].flush();
      }
      units -= here;
    }
    TILE_UNROLL for (int t = 0; t < T; ++t) {
      float* to = totals + t * kOctet;
      _mm256_storeu_ps(to, add_block<B>(_mm256_loadu_ps(to), sums[t][0].wide, sums[t][1].wide, scale,
                                        x_steps[t], x_sums[t]));
    }
  }

  template <int32_t B, int T>
  static TILE_INLINE void run_micro(int64_t tokens, const I* steps, int64_t units, const int8_t* q,
                                   int64_t q_stride, F scale, const float* x_steps,
                                   const int32_t* x_sums, float* totals) {
    if (tokens == T) {
      micro<B, T>(steps, units, q, q_stride, scale, x_steps, x_sums, totals);
    } else if constexpr (T > 1) {
      run_micro<B, T - 1>(tokens, steps, units, q, q_stride, scale, x_steps, x_sums, totals);
    }
  }

  template <int32_t B, int32_t K>
  static void blocked(const IntegerProduct& p, int64_t tile_begin, int64_t tile_end) {
    const IntegerWeight& w = *p.weight;
    const int64_t block_units = w.block_units(), tile_steps = 2 * block_units;
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
      for (int64_t block = 0; block < w.blocks(); ++block) {
        const int64_t units = min64(block_units, w.units() - block * block_units);
        for (int64_t t = 0; t < tiles; ++t) {
          I* to = decoded + t * tile_steps;
          for (int64_t u = 0; u < units; ++u, to += 2) {
            __builtin_prefetch(values[t] + kPrefetchBytes);
            _mm256_store_si256(to, Dot::template next<B, K>(values[t], masks[t], w.kept));
            _mm256_store_si256(to + 1, Dot::template next<B, K>(values[t], masks[t] + 4, w.kept));
            if (K != kKeptAll) masks[t] += kOctet;
          }
        }
        const int64_t columns = w.block_columns();
        for (int64_t token = 0; token < p.m; token += kTokens) {
          const int64_t tokens = min64(kTokens, p.m - token), place = block * p.m + token;
          for (int64_t t = 0; t < tiles; ++t) {
            run_micro<B, kTokens>(tokens, decoded + t * tile_steps, units,
                                  p.block_q(block) + token * columns, columns,
                                  floats(w.block_scales(first + t, block)), p.steps + place,
                                  p.sums + place, totals + (t * p.m + token) * kOctet);
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
