// One token times a dense weight W[N][K], for the output head of a model whose other layers are
// sparse: it streams W once, and nothing else about it takes time. Written once over an instruction
// set's `Isa` traits, see vector_path.h. Included after it.
//
// Rows are multiplied four at a time, each with sums of its own that are added in one fixed order, so
// that an output doesn't depend on which rows a thread was given.

template <class Isa>
struct Gemv {
  using F = typename Isa::F;
  static constexpr int V = Isa::V;
  static constexpr int kLanes = static_cast<int>(kRows) / V;
  static constexpr int kSets = Isa::kAccumulators >= 4 * V * 2 ? 2 : 1;
  static constexpr int64_t kStep = kSets * 16;

  template <int32_t D, int Rows>
  static void rows(const DenseProduct& p, int64_t first) {
    const auto* w = static_cast<const uint8_t*>(p.w) + first * p.w_stride * item_size(D);
    const int64_t row_bytes = p.w_stride * item_size(D);
    F sums[kSets][Rows][V];
    T16_UNROLL for (int s = 0; s < kSets; ++s) {
      T16_UNROLL for (int r = 0; r < Rows; ++r) {
        T16_UNROLL for (int v = 0; v < V; ++v) sums[s][r][v] = Isa::zero();
      }
    }
    int64_t at = 0;
    for (; at + kStep <= p.k; at += kStep) {
      T16_UNROLL for (int r = 0; r < Rows; ++r) {
        __builtin_prefetch(w + r * row_bytes + at * item_size(D) + kPrefetchBytes);
        T16_UNROLL for (int s = 0; s < kSets; ++s) {
          float weights[16];
          Isa::load16(w + r * row_bytes, at + s * 16, D, weights);
          T16_UNROLL for (int v = 0; v < V; ++v) {
            sums[s][r][v] = Isa::fma(Isa::load(weights + v * kLanes),
                                     Isa::load(p.x + at + s * 16 + v * kLanes), sums[s][r][v]);
          }
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      F all = sums[0][r][0];
      for (int i = 1; i < kSets * V; ++i) all = Isa::add(all, sums[i / V][r][i % V]);
      alignas(64) float lanes[kLanes];
      Isa::store(lanes, all);
      float sum = 0.0f;
      for (int i = 0; i < kLanes; ++i) sum += lanes[i];
      for (int64_t c = at; c < p.k; ++c) sum += load_as_float(w + r * row_bytes, c, D) * p.x[c];
      store_from_float(p.y, first + r, p.y_dtype, sum);
    }
  }

  template <int32_t D>
  static void range(const DenseProduct& p, int64_t begin, int64_t end) {
    for (; begin + 4 <= end; begin += 4) rows<D, 4>(p, begin);
    for (; begin < end; ++begin) rows<D, 1>(p, begin);
  }

  static void multiply(const DenseProduct& p, int64_t begin, int64_t end) {
    p.w_dtype == kBF16 ? range<kBF16>(p, begin, end) : range<kF16>(p, begin, end);
  }
};
