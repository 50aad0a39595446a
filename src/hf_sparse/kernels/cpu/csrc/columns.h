// One token times a weight that is held by column: only the columns whose x isn't 0 are read. Written
// once over an instruction set's `Isa` traits, see vector_path.h. Included after it.
//
// A few columns are added to the sums together, so that the sums, which lie in the first cache, are
// read and written once for all of them. While they are, the same places of the next columns are
// called from memory: a column is too short for the processor to see where the next one will be.

template <class Isa>
struct Columns {
  using F = typename Isa::F;
  static constexpr int V = Isa::V;
  static constexpr int kLanes = static_cast<int>(kRows) / V;
  static constexpr int kDense = 8;   // columns together
  static constexpr int kPacked = 2;

  static void store_rows(const ColumnProduct& p, const float* sums, int64_t begin, int64_t end) {
    int64_t r = begin;
    for (; r + kRows <= end; r += kRows) {
      alignas(64) float out[kRows];
      for (int v = 0; v < V; ++v) {
        F sum = Isa::load(sums + r - begin + v * kLanes);
        if (p.bias) sum = Isa::add(sum, Isa::load(p.bias + r + v * kLanes));
        Isa::store(out + v * kLanes, sum);
      }
      Isa::store16(p.y, r, p.y_dtype, out);
    }
    for (; r < end; ++r) {
      store_from_float(p.y, r, p.y_dtype, sums[r - begin] + (p.bias ? p.bias[r] : 0.0f));
    }
  }

  // ---- dense, W'[K][N]

  template <int32_t D, int C>
  static void add_dense(const ColumnProduct& p, int64_t at, int64_t begin, int64_t end,
                        float* sums) {
    const int64_t size = D == kF32 ? 4 : 2, n = p.weight->n;
    const auto* dense = static_cast<const char*>(p.weight->dense);
    const char *w[C], *next[C];
    F x[C];
    TILE_UNROLL for (int c = 0; c < C; ++c) {
      const int64_t later = min64(at + C + c, p.count - 1);
      w[c] = dense + (p.active[at + c] * n + begin) * size;
      next[c] = dense + (p.active[later] * n + begin) * size;
      x[c] = Isa::set1(p.x[at + c]);
    }
    int64_t r = 0;
    for (; r + kRows <= end - begin; r += kRows) {
      F sum[V];
      TILE_UNROLL for (int v = 0; v < V; ++v) sum[v] = Isa::load(sums + r + v * kLanes);
      TILE_UNROLL for (int c = 0; c < C; ++c) {
        __builtin_prefetch(next[c] + r * size);
        float widened[kRows];
        const float* weights = widened;
        if constexpr (D == kF32) {
          weights = reinterpret_cast<const float*>(w[c]) + r;
        } else {
          Isa::load16(w[c], r, D, widened);
        }
        TILE_UNROLL for (int v = 0; v < V; ++v) {
          sum[v] = Isa::fma(Isa::load(weights + v * kLanes), x[c], sum[v]);
        }
      }
      TILE_UNROLL for (int v = 0; v < V; ++v) Isa::store(sums + r + v * kLanes, sum[v]);
    }
    for (; r < end - begin; ++r) {
      for (int c = 0; c < C; ++c) sums[r] += load_as_float(w[c], r, D) * p.x[at + c];
    }
  }

  template <int32_t D>
  static void dense_rows(const ColumnProduct& p, int64_t first, int64_t last) {
    alignas(64) float sums[kMostPanelRows];
    for (int64_t begin = first; begin < last; begin += kMostPanelRows) {
      const int64_t end = min64(last, begin + kMostPanelRows);
      std::memset(sums, 0, static_cast<size_t>(end - begin) * sizeof(float));
      int64_t at = 0;
      for (; at + kDense <= p.count; at += kDense) add_dense<D, kDense>(p, at, begin, end, sums);
      for (; at < p.count; ++at) add_dense<D, 1>(p, at, begin, end, sums);
      store_rows(p, sums, begin, end);
    }
  }

  static void dense(const ColumnProduct& p, int64_t begin, int64_t end) {
    switch (p.weight->dense_dtype) {
      case kF32: return dense_rows<kF32>(p, begin, end);
      case kBF16: return dense_rows<kBF16>(p, begin, end);
      default: return dense_rows<kF16>(p, begin, end);
    }
  }

  // ---- packed, a panel of rows to a tile

  template <int32_t D, int C>
  static void add_packed(const ColumnProduct& p, int64_t panel, int64_t at, float* sums) {
    const Weight& w = *p.weight->packed;
    const int64_t pairs = p.weight->panel_pairs();
    const int32_t* offsets = p.weight->offsets + panel * p.weight->k;
    Values<D> values[C];
    const uint32_t* masks[C];
    const char *next_values[C], *next_masks[C];
    F x[C];
    TILE_UNROLL for (int c = 0; c < C; ++c) {
      const int64_t column = p.active[at + c], later = p.active[min64(at + C + c, p.count - 1)];
      values[c] = w.tile_values<D>(panel) + offsets[column];
      next_values[c] = address_of(w.tile_values<D>(panel) + offsets[later]);
      masks[c] = w.tile_masks(panel) + column * pairs;
      next_masks[c] = reinterpret_cast<const char*>(w.tile_masks(panel) + later * pairs);
      x[c] = Isa::set1(p.x[at + c]);
    }
    for (int64_t i = 0; i < pairs; ++i) {
      float* to = sums + i * 2 * kRows;
      F low[V], high[V];
      TILE_UNROLL for (int v = 0; v < V; ++v) {
        low[v] = Isa::load(to + v * kLanes);
        high[v] = Isa::load(to + kRows + v * kLanes);
      }
      TILE_UNROLL for (int c = 0; c < C; ++c) {
        const uint32_t mask = masks[c][i];
        F even[V], odd[V];
        Isa::template decode<D>(values[c], mask, even, odd);
        __builtin_prefetch(next_values[c] + i * (D == kF32 ? 64 : 32));
        if (i % 16 == 0) __builtin_prefetch(next_masks[c] + i * 4);
        values[c] += __builtin_popcount(mask);
        TILE_UNROLL for (int v = 0; v < V; ++v) {
          low[v] = Isa::fma(even[v], x[c], low[v]);
          high[v] = Isa::fma(odd[v], x[c], high[v]);
        }
      }
      TILE_UNROLL for (int v = 0; v < V; ++v) {
        Isa::store(to + v * kLanes, low[v]);
        Isa::store(to + kRows + v * kLanes, high[v]);
      }
    }
  }

  template <int32_t D>
  static void packed_panels(const ColumnProduct& p, int64_t first, int64_t last) {
    alignas(64) float sums[kMostPanelRows];
    const int64_t rows = p.weight->panel_rows;
    for (int64_t panel = first; panel < last; ++panel) {
      std::memset(sums, 0, static_cast<size_t>(rows) * sizeof(float));
      int64_t at = 0;
      for (; at + kPacked <= p.count; at += kPacked) add_packed<D, kPacked>(p, panel, at, sums);
      for (; at < p.count; ++at) add_packed<D, 1>(p, panel, at, sums);
      store_rows(p, sums, panel * rows, min64(p.weight->n, (panel + 1) * rows));
    }
  }

  static void packed(const ColumnProduct& p, int64_t begin, int64_t end) {
    switch (p.weight->packed->value_dtype) {
      case kF32: return packed_panels<kF32>(p, begin, end);
      case kBF16: return packed_panels<kBF16>(p, begin, end);
      default: return packed_panels<kF16>(p, begin, end);
    }
  }
};
