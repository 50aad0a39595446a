// One token times a dense weight W[N][K], for the output head of a model whose other layers are
// sparse: it streams W once, and nothing else about it takes time. Written once over an instruction
// set's `Isa` traits, see vector_path.h. Included after it.
//
// Row after row, so that memory is read in one stream that the prefetchers can follow. The sums of a
// row are added in one fixed order: an output doesn't depend on which rows a thread was given.

template <class Isa>
struct DenseRow {
  using F = typename Isa::F;
  static constexpr int V = Isa::V;
  static constexpr int kLanes = static_cast<int>(kRows) / V;
  static constexpr int kSets = V == 1 ? 4 : 8 / V;  // 4 to 8 sums hide the multiply-add's latency
  static constexpr int64_t kStep = kSets * 16;

  template <int32_t D>
  static float row(const DenseProduct& p, const uint16_t* w) {
    F sums[kSets][V];
    TILE_UNROLL for (int s = 0; s < kSets; ++s) {
      TILE_UNROLL for (int v = 0; v < V; ++v) sums[s][v] = Isa::zero();
    }
    int64_t at = 0;
    for (; at + kStep <= p.k; at += kStep) {
      TILE_UNROLL for (int s = 0; s < kSets; ++s) {
        const int64_t i = at + s * 16;
        if (s % 2 == 0) __builtin_prefetch(w + i + kPrefetchBytes / 2);
        float weights[16];
        Isa::load16(w, i, D, weights);
        TILE_UNROLL for (int v = 0; v < V; ++v) {
          sums[s][v] = Isa::fma(Isa::load(weights + v * kLanes), Isa::load(p.x + i + v * kLanes),
                                sums[s][v]);
        }
      }
    }
    F all = sums[0][0];
    TILE_UNROLL for (int i = 1; i < kSets * V; ++i) all = Isa::add(all, sums[i / V][i % V]);
    alignas(64) float lanes[kLanes];
    Isa::store(lanes, all);
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += lanes[i];
    for (; at < p.k; ++at) sum += load_as_float(w, at, D) * p.x[at];
    return sum;
  }

  template <int32_t D>
  static void range(const DenseProduct& p, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float sum = row<D>(p, static_cast<const uint16_t*>(p.w) + r * p.w_stride);
      store_from_float(p.y, r, p.y_dtype, sum);
    }
  }

  static void multiply(const DenseProduct& p, int64_t begin, int64_t end) {
    p.w_dtype == kBF16 ? range<kBF16>(p, begin, end) : range<kF16>(p, begin, end);
  }
};
