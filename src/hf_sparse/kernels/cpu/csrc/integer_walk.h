// The integer products, written once over a `Dot` that knows how a step is held, decoded and
// multiplied. Included inside an anonymous namespace, after vector_path.h.
//
// One token: each step is decoded in registers and multiplied at once. More tokens: a span of four
// tiles is decoded to 4 KB of scratch, and all tokens take it from there, four at a time.
//
// A Dot has:
//   I, a step of 32 bytes, and F, 8 numbers in fp32, with zero, load, store, add and fma;
//   floats(bf16): 8 of them. store8: 8 to memory in any dtype. repeat8: 8 bytes, as often as a step
//   has octets.
//   next<bits, kept>(values, masks, count): the step at `values` as `add` takes it; moves `values` on
//   by the step's bytes. `count` codes of each octet are kept, if that is fixed.
//   Sum<bits>: of steps' products, over the units of a block at most. rows(low, high, block): the sums
//   of rows 0-3 and 4-7, less what codes have too much in them; in_order puts the rows in order.

template <class Dot>
struct IntegerWalk {
  using I = typename Dot::I;
  using F = typename Dot::F;
  static constexpr int64_t kTiles = 4;
  static constexpr int kTokens = 4;
  static constexpr int64_t kBlockUnits = kLargestBlock / kOctet;

  template <class Sum>
  static TILE_INLINE F add_block(F to, const Sum& low, const Sum& high, const RoundedBlock& block) {
    return Dot::fma(Dot::rows(low, high, block), Dot::set1(block.step), to);
  }

  // total + scaled sums of a span, for 8 rows in order.
  static TILE_INLINE F add_span(F total, F sums, F scale) {
    return Dot::fma(Dot::in_order(sums), scale, total);
  }

  static TILE_INLINE void store_rows(const IntegerProduct& p, int64_t tile, int64_t token, F sums) {
    if (p.bias) sums = Dot::add(sums, Dot::load(p.bias + tile * kOctet));
    const int64_t at = token * p.y_stride + tile * kOctet;
    const int64_t rows = min64(kOctet, p.weight->n - tile * kOctet);
    if (rows == kOctet) return Dot::store8(p.y, at, p.y_dtype, sums);
    float each[kOctet];
    Dot::store(each, sums);
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
      F total = Dot::zero();
      for (int64_t span = 0; span < w.spans(); ++span) {
        F sums = Dot::zero();
        int64_t left = min64(w.span_units(), w.units() - span * w.span_units());
        for (; left > 0; left -= block_units, ++block) {
          typename Dot::template Sum<B> low, high;
          const auto unit = [&]() TILE_INLINE_LAMBDA {
            __builtin_prefetch(values + kPrefetchBytes);
            const I x = Dot::repeat8(q);
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
          sums = add_block(sums, low, high, *block);
        }
        total = add_span(total, sums, Dot::floats(w.span_scales(tile, span)));
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
    F sums[T];
    TILE_UNROLL for (int t = 0; t < T; ++t) sums[t] = Dot::zero();
    while (units > 0) {
      const int64_t here = min64(units, w.block_units());
      typename Dot::template Sum<B> exact[T][2];
      for (int64_t u = 0; u < here; ++u, steps += 2, q += kOctet) {
        const I low = steps[0], high = steps[1];
        TILE_UNROLL for (int t = 0; t < T; ++t) {
          const I x = Dot::repeat8(q + t * q_stride);
          exact[t][0].add(low, x);
          exact[t][1].add(high, x);
        }
      }
      TILE_UNROLL for (int t = 0; t < T; ++t) {
        sums[t] = add_block(sums[t], exact[t][0], exact[t][1], blocks[t * block_stride]);
      }
      units -= here;
      ++blocks;
    }
    TILE_UNROLL for (int t = 0; t < T; ++t) {
      float* to = totals + t * kOctet;
      Dot::store(to, add_span(Dot::load(to), sums[t], scale));
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
            to[0] = Dot::template next<B, K>(values[t], masks[t], w.kept);
            to[1] = Dot::template next<B, K>(values[t], masks[t] + 4, w.kept);
            if (K != kKeptAll) masks[t] += kOctet;
          }
        }
        for (int64_t token = 0; token < p.m; token += kTokens) {
          for (int64_t t = 0; t < tiles; ++t) {
            run_micro<B, kTokens>(min64(kTokens, p.m - token), w, decoded + t * tile_steps, units,
                                  p.span_q(span, token), p.span_blocks(span, token),
                                  Dot::floats(w.span_scales(first + t, span)),
                                  totals + (t * p.m + token) * kOctet);
          }
        }
      }
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t m = 0; m < p.m; ++m) {
          store_rows(p, first + t, m, Dot::load(totals + (t * p.m + m) * kOctet));
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
