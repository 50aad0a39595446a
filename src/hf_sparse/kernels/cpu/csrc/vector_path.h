// The products, written once over an instruction set's `Isa` traits and instantiated by its file.
//
// Direct (few tokens): a tile is decoded once, in registers, and every token's accumulators take it.
//   x is packed as [pair][token][2], so that a pair's broadcasts are neighbours.
// Blocked (more tokens than registers hold): 256 columns of up to 8 tiles are decoded to fp32
//   scratch that stays in L2, then a register block of kMicroTiles x kMicroTokens runs over it for
//   each chunk of tokens. The decoding is paid once per 256 columns however many tokens there are.
//
// Included inside an anonymous namespace, after the file's target pragma: each instruction set gets
// its own copies, and the linker can't merge them into one that another CPU is unable to run.
//
// An Isa has: F, a vector of fp32; V, how many of them hold 16 rows; the operations below; what
// differs from IsaDefaults; and
//   decode<D>(values, mask, even, odd): the weights of a pair's two columns, rows in order.
//   kDecodesTwo<D>: is there decode_two(values, masks, even, odd), for two pairs at once?
//   kInt8Unit, kInt4Unit: what decoded int8 and int4 weights must be multiplied by (a shift that they
//   don't undo).

#if defined(__clang__)
#define TILE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TILE_UNROLL _Pragma("GCC unroll 64")
#endif
#define TILE_INLINE inline __attribute__((always_inline))
#define TILE_INLINE_LAMBDA __attribute__((always_inline))

constexpr int64_t kGroupTiles = 8;      // tiles decoded together in the blocked product
constexpr int64_t kPrefetchBytes = 2048;  // how far ahead of the decoder memory is called

// Columns that share a scale, in pairs.
inline int64_t pairs_per_group(const Weight& w) {
  return has_scales(w.value_dtype) && w.group_size < w.k ? w.group_size / 2 : w.pairs();
}

// What most instruction sets have in common.
struct IsaDefaults {
  static constexpr int64_t kMaxDirect = 4;
  static constexpr int kMicroTiles = 1;
  static constexpr int kMicroTokens = 6;
  static constexpr float kInt8Unit = 0x1p-16f;
  static constexpr float kInt4Unit = 0x1p-20f;
  template <int32_t>
  static constexpr bool kDecodesTwo = false;
};

template <class Isa>
struct VectorPath {
  using F = typename Isa::F;
  static constexpr int V = Isa::V;
  static constexpr int kLanes = static_cast<int>(kRows) / V;

  static int64_t chunk_tokens(const Product& p, int64_t chunk) {
    return min64(p.chunk, p.m - chunk * p.chunk);
  }
  static int64_t chunks(const Product& p) { return ceil_div(p.m, p.chunk); }
  static const float* chunk_x(const Product& p, int64_t chunk) {
    return static_cast<const float*>(p.packed_x) + chunk * p.chunk * p.weight->pairs() * 2;
  }

  static bool fits(const Product&) { return true; }

  // Chunks of equal size: 13 tokens are better served by 7 + 6 than by 12 + 1.
  static int64_t plan(Product& p) {
    const int64_t limit = p.m <= Isa::kMaxDirect ? p.m : Isa::kMicroTokens;
    p.chunk = ceil_div(p.m, ceil_div(p.m, limit));
    if (p.m == 1 && p.x_dtype == kF32 && p.weight->k % 2 == 0) {
      p.packed_x = const_cast<void*>(p.x);
      return 0;
    }
    return p.m * p.weight->pairs() * 2 * static_cast<int64_t>(sizeof(float));
  }

  static int64_t pack_units(const Product& p) { return chunks(p); }

  static void pack_x(const Product& p, int64_t begin, int64_t end) {
    const int64_t k = p.weight->k;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t tokens = chunk_tokens(p, chunk);
      float* out = const_cast<float*>(chunk_x(p, chunk));
      for (int64_t m = 0; m < tokens; ++m) {
        const int64_t row = (chunk * p.chunk + m) * p.x_stride;
        int64_t at = 0;
        for (; at + 16 <= k; at += 16) {
          float in[16];
          Isa::load16(p.x, row + at, p.x_dtype, in);
          for (int i = 0; i < 8; ++i) {
            std::memcpy(out + ((at / 2 + i) * tokens + m) * 2, in + 2 * i, 2 * sizeof(float));
          }
        }
        for (; at < k; ++at) {
          out[(at / 2 * tokens + m) * 2 + at % 2] = load_as_float(p.x, row + at, p.x_dtype);
        }
        if (k % 2 != 0) out[(k / 2 * tokens + m) * 2 + 1] = 0.0f;
      }
    }
  }

  static int64_t group_tiles(const Product& p) {
    return p.m <= 64 ? Isa::kMicroTiles : kGroupTiles;
  }
  static int64_t grain(const Product& p) { return p.m <= Isa::kMaxDirect ? 1 : group_tiles(p); }

  template <int32_t D>
  static TILE_INLINE F scale_of(const Weight& w, int64_t tile, int64_t group, int v) {
    constexpr float kUnit = D == kI4 ? Isa::kInt4Unit : Isa::kInt8Unit;
    const float* scale = w.scales + (tile * w.groups() + group) * kRows;
    return Isa::mul(Isa::load(scale + v * kLanes), Isa::set1(kUnit));
  }

  // sums[16] + bias -> y[token][tile's outputs].
  static TILE_INLINE void store_outputs(const Product& p, int64_t tile, int64_t token,
                                       const float* sums) {
    alignas(64) float out[kRows];
    for (int v = 0; v < V; ++v) {
      F sum = Isa::load(sums + v * kLanes);
      if (p.bias) sum = Isa::add(sum, Isa::load(p.bias + tile * kRows + v * kLanes));
      Isa::store(out + v * kLanes, sum);
    }
    const int64_t at = token * p.y_stride + tile * kRows;
    const int64_t rows = min64(kRows, p.weight->n - tile * kRows);
    if (rows == kRows) {
      Isa::store16(p.y, at, p.y_dtype, out);
    } else {
      for (int64_t r = 0; r < rows; ++r) store_from_float(p.y, at + r, p.y_dtype, out[r]);
    }
  }

  // ---- direct

  template <int32_t D, int M>
  static void direct_tile(const Product& p, int64_t tile) {
    const Weight& w = *p.weight;
    // Two pairs a step and an accumulator for each column of them hide the latency of the
    // multiply-add when there are few tokens; many tokens hide it by themselves.
    constexpr int kUnroll = M == 1 ? 2 : 1;
    constexpr int kSets = M * V * 2 * kUnroll <= Isa::kAccumulators ? 2 * kUnroll : 1;
    Values<D> values = w.tile_values<D>(tile);
    const uint32_t* masks = w.tile_masks(tile);
    const float* x = static_cast<const float*>(p.packed_x);
    const int64_t pairs = w.pairs(), group_pairs = pairs_per_group(w);

    F total[M][V];
    TILE_UNROLL for (int m = 0; m < M; ++m) {
      TILE_UNROLL for (int v = 0; v < V; ++v) total[m][v] = Isa::zero();
    }
    int64_t group = 0;
    for (int64_t pair = 0; pair < pairs; ++group) {
      const int64_t end = min64(pairs, pair + group_pairs);
      F acc[kSets][M][V];
      TILE_UNROLL for (int s = 0; s < kSets; ++s) {
        TILE_UNROLL for (int m = 0; m < M; ++m) {
          TILE_UNROLL for (int v = 0; v < V; ++v) acc[s][m][v] = Isa::zero();
        }
      }
      auto multiply = [&](int64_t at, int u, const F(&even)[V],
                          const F(&odd)[V]) TILE_INLINE_LAMBDA {
        TILE_UNROLL for (int m = 0; m < M; ++m) {
          const F x0 = Isa::set1(x[(at * M + m) * 2]), x1 = Isa::set1(x[(at * M + m) * 2 + 1]);
          F(&to0)[V] = acc[2 * u % kSets][m];
          F(&to1)[V] = acc[(2 * u + 1) % kSets][m];
          TILE_UNROLL for (int v = 0; v < V; ++v) to0[v] = Isa::fma(even[v], x0, to0[v]);
          TILE_UNROLL for (int v = 0; v < V; ++v) to1[v] = Isa::fma(odd[v], x1, to1[v]);
        }
      };
      auto step = [&](int64_t at, int u) TILE_INLINE_LAMBDA {
        const uint32_t mask = masks[at];
        F even[V], odd[V];
        Isa::template decode<D>(values, mask, even, odd);
        values += __builtin_popcount(mask);
        multiply(at, u, even, odd);
      };
      for (; pair + kUnroll <= end; pair += kUnroll) {
        __builtin_prefetch(address_of(values) + kPrefetchBytes);
        __builtin_prefetch(masks + pair + kPrefetchBytes / 4);
        if constexpr (kUnroll == 2 && Isa::template kDecodesTwo<D>) {
          uint64_t mask;
          std::memcpy(&mask, masks + pair, 8);
          F even[2][V], odd[2][V];
          Isa::decode_two(values, mask, even, odd);
          values += __builtin_popcountll(mask);
          TILE_UNROLL for (int u = 0; u < 2; ++u) multiply(pair + u, u, even[u], odd[u]);
        } else {
          TILE_UNROLL for (int u = 0; u < kUnroll; ++u) step(pair + u, u);
        }
      }
      for (; pair < end; ++pair) step(pair, 0);
      TILE_UNROLL for (int m = 0; m < M; ++m) {
        TILE_UNROLL for (int v = 0; v < V; ++v) {
          F sum = acc[0][m][v];
          TILE_UNROLL for (int s = 1; s < kSets; ++s) sum = Isa::add(sum, acc[s][m][v]);
          if (has_scales(D)) {
            total[m][v] = Isa::fma(sum, scale_of<D>(w, tile, group, v), total[m][v]);
          } else {
            total[m][v] = sum;
          }
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      alignas(64) float sums[kRows];
      TILE_UNROLL for (int v = 0; v < V; ++v) Isa::store(sums + v * kLanes, total[m][v]);
      store_outputs(p, tile, m, sums);
    }
  }

  template <int32_t D, int M>
  static void direct(const Product& p, int64_t tile_begin, int64_t tile_end) {
    if (p.m == M) {
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) direct_tile<D, M>(p, tile);
    } else if constexpr (M > 1) {
      direct<D, M - 1>(p, tile_begin, tile_end);
    }
  }

  // ---- blocked

  // A decoder's place in a tile.
  template <int32_t D>
  struct Cursor {
    Values<D> values;
    const uint32_t* masks;
  };

  // Decodes `pairs` pairs from `first` on to out[pair][2][16], scales applied.
  template <int32_t D>
  static void decode_block(const Weight& w, int64_t tile, int64_t first, int64_t pairs,
                           Cursor<D>& cursor, float* out) {
    const int64_t group_pairs = pairs_per_group(w);
    for (int64_t i = 0; i < pairs;) {
      const int64_t group = (first + i) / group_pairs;
      const int64_t end = min64(pairs, (group + 1) * group_pairs - first);
      F scale[V];
      if (has_scales(D)) {
        TILE_UNROLL for (int v = 0; v < V; ++v) scale[v] = scale_of<D>(w, tile, group, v);
      }
      for (; i < end; ++i) {
        const uint32_t mask = *cursor.masks++;
        F even[V], odd[V];
        Isa::template decode<D>(cursor.values, mask, even, odd);
        __builtin_prefetch(address_of(cursor.values) + kPrefetchBytes);
        cursor.values += __builtin_popcount(mask);
        float* to = out + i * 2 * kRows;
        TILE_UNROLL for (int v = 0; v < V; ++v) {
          if (has_scales(D)) {
            even[v] = Isa::mul(even[v], scale[v]);
            odd[v] = Isa::mul(odd[v], scale[v]);
          }
          Isa::store(to + v * kLanes, even[v]);
          Isa::store(to + kRows + v * kLanes, odd[v]);
        }
      }
    }
  }

  static constexpr int64_t kTileFloats = kBlockPairs * 2 * kRows;  // a decoded block of one tile

  // sums[T][M][16] += w[T][pairs][2][16] x[pairs][M][2]
  template <int T, int M>
  static void micro(const float* w, const float* x, int64_t pairs, float* sums) {
    F acc[T][M][V];
    TILE_UNROLL for (int t = 0; t < T; ++t) {
      TILE_UNROLL for (int m = 0; m < M; ++m) {
        TILE_UNROLL for (int v = 0; v < V; ++v) {
          acc[t][m][v] = Isa::load(sums + (t * M + m) * kRows + v * kLanes);
        }
      }
    }
    for (int64_t pair = 0; pair < pairs; ++pair, w += 2 * kRows, x += 2 * M) {
      TILE_UNROLL for (int c = 0; c < 2; ++c) {
        F weight[T][V];
        TILE_UNROLL for (int t = 0; t < T; ++t) {
          TILE_UNROLL for (int v = 0; v < V; ++v) {
            weight[t][v] = Isa::load(w + t * kTileFloats + c * kRows + v * kLanes);
          }
        }
        TILE_UNROLL for (int m = 0; m < M; ++m) {
          const F xm = Isa::set1(x[m * 2 + c]);
          TILE_UNROLL for (int t = 0; t < T; ++t) {
            TILE_UNROLL for (int v = 0; v < V; ++v) {
              acc[t][m][v] = Isa::fma(weight[t][v], xm, acc[t][m][v]);
            }
          }
        }
      }
    }
    TILE_UNROLL for (int t = 0; t < T; ++t) {
      TILE_UNROLL for (int m = 0; m < M; ++m) {
        TILE_UNROLL for (int v = 0; v < V; ++v) {
          Isa::store(sums + (t * M + m) * kRows + v * kLanes, acc[t][m][v]);
        }
      }
    }
  }

  template <int T, int M>
  static TILE_INLINE void run_micro(int64_t tokens, const float* w, const float* x, int64_t pairs,
                                   float* sums) {
    if (tokens == M) {
      micro<T, M>(w, x, pairs, sums);
    } else if constexpr (M > 1) {
      run_micro<T, M - 1>(tokens, w, x, pairs, sums);
    }
  }

  template <int32_t D>
  static void blocked(const Product& p, int64_t tile_begin, int64_t tile_end) {
    const Weight& w = *p.weight;
    const int64_t step = group_tiles(p), pairs = w.pairs();
    float* decoded = scratch_of<float>(kScratchTile, step * kTileFloats);
    float* sums = scratch_of<float>(kScratchSum, step * p.m * kRows);
    if (!decoded || !sums) return report_no_memory();

    for (int64_t first = tile_begin; first < tile_end; first += step) {
      const int64_t count = min64(step, tile_end - first);
      Cursor<D> cursors[kGroupTiles];
      for (int64_t t = 0; t < count; ++t) {
        cursors[t] = {w.tile_values<D>(first + t), w.tile_masks(first + t)};
      }
      std::memset(sums, 0, static_cast<size_t>(count * p.m * kRows) * sizeof(float));
      for (int64_t at = 0; at < pairs; at += kBlockPairs) {
        const int64_t block = min64(kBlockPairs, pairs - at);
        for (int64_t t = 0; t < count; ++t) {
          decode_block<D>(w, first + t, at, block, cursors[t], decoded + t * kTileFloats);
        }
        for (int64_t c = 0; c < chunks(p); ++c) {
          const int64_t tokens = chunk_tokens(p, c);
          const float* x = chunk_x(p, c) + at * tokens * 2;
          float* to = sums + c * p.chunk * count * kRows;  // [tile][token][16] of this chunk
          int64_t t = 0;
          for (; t + Isa::kMicroTiles <= count; t += Isa::kMicroTiles) {
            run_micro<Isa::kMicroTiles, Isa::kMicroTokens>(
                tokens, decoded + t * kTileFloats, x, block, to + t * tokens * kRows);
          }
          if constexpr (Isa::kMicroTiles > 1) {
            for (; t < count; ++t) {
              run_micro<1, Isa::kMicroTokens>(tokens, decoded + t * kTileFloats, x, block,
                                              to + t * tokens * kRows);
            }
          }
        }
      }
      for (int64_t c = 0; c < chunks(p); ++c) {
        const int64_t tokens = chunk_tokens(p, c);
        const float* from = sums + c * p.chunk * count * kRows;
        for (int64_t m = 0; m < tokens; ++m) {
          for (int64_t t = 0; t < count; ++t) {
            store_outputs(p, first + t, c * p.chunk + m, from + (t * tokens + m) * kRows);
          }
        }
      }
    }
  }

  template <int32_t D>
  static void multiply_values(const Product& p, int64_t tile_begin, int64_t tile_end) {
    if (p.m <= Isa::kMaxDirect) {
      direct<D, Isa::kMaxDirect>(p, tile_begin, tile_end);
    } else {
      blocked<D>(p, tile_begin, tile_end);
    }
  }

  static void multiply(const Product& p, int64_t tile_begin, int64_t tile_end) {
    switch (p.weight->value_dtype) {
      case kF32: return multiply_values<kF32>(p, tile_begin, tile_end);
      case kBF16: return multiply_values<kBF16>(p, tile_begin, tile_end);
      case kF16: return multiply_values<kF16>(p, tile_begin, tile_end);
      case kI8: return multiply_values<kI8>(p, tile_begin, tile_end);
      default: return multiply_values<kI4>(p, tile_begin, tile_end);
    }
  }
};

#include "columns.h"
#include "decode.h"
#include "dense_row.h"

template <class Isa>
constexpr Path path_of(const char* name, bool (*available)(),
                       const IntegerPath* integer = nullptr) {
  using Walk = VectorPath<Isa>;
  return {name,         available,  Walk::fits,     Walk::plan,           Walk::pack_units,
          Walk::pack_x, Walk::grain, Walk::multiply, Decoder<Isa>::decode, DenseRow<Isa>::multiply,
          Columns<Isa>::dense, Columns<Isa>::packed, integer};
}
