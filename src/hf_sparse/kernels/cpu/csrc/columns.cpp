// Products with a weight held by column: check it, list the columns whose x isn't 0, multiply those.
#include "abi.h"
#include "convert.h"

namespace tiles {
namespace {

// As dispatch.cpp's: below this many multiplications the pool isn't woken.
constexpr int64_t kSerialWork = 1 << 18;

int32_t check_columns(const ColumnWeight& w) {
  if (!is_dim(w.n) || !is_dim(w.k)) return kBadSize;
  if (!w.packed) return !w.dense ? kNoArray : is_float(w.dense_dtype) ? kOk : kBadDType;
  if (w.panel_rows < 32 || w.panel_rows > kMostPanelRows || w.panel_rows % 32 != 0) {
    return kBadPanels;
  }
  const Weight& packed = *w.packed;
  if (packed.n != w.panels() * kRows || packed.k != w.k * (w.panel_rows / kRows)) return kBadPanels;
  if (!is_float(packed.value_dtype)) return kBadDType;
  return w.offsets ? kOk : kNoArray;
}

}  // namespace
}  // namespace tiles

using namespace tiles;

// Where each column begins: offsets[panels][K] of a weight whose packed form has passed tile_check.
TILE_EXPORT int32_t columns_index(const ColumnWeight* weight, int32_t* offsets) {
  const ColumnWeight& w = *weight;
  const int32_t code = check_columns(w);
  if (code != kOk) return code;
  if (!w.packed) return kNoArray;
  for (int64_t panel = 0; panel < w.panels(); ++panel) {
    const uint32_t* masks = w.packed->tile_masks(panel);
    int32_t at = 0;  // a tile has at most 16 * kMaxDim values
    for (int64_t c = 0; c < w.k; ++c) {
      offsets[panel * w.k + c] = at;
      for (int64_t i = 0; i < w.panel_pairs(); ++i) at += __builtin_popcount(*masks++);
    }
  }
  return kOk;
}

TILE_EXPORT int32_t columns_check(const ColumnWeight* weight) { return check_columns(*weight); }

// As tile_linear, a token after the other.
TILE_EXPORT int32_t columns_linear(const ColumnWeight* weight, int32_t path, const void* x,
                                   int32_t x_dtype, int64_t m, int64_t x_stride, const void* bias,
                                   int32_t bias_dtype, void* y, int32_t y_dtype, int64_t y_stride,
                                   ParallelFor pool) {
  const ColumnWeight& w = *weight;
  const int32_t code = check_columns(w);
  if (code != kOk) return code;
  if (m < 0 || m > kMaxDim || !is_stride(x_stride, w.k) || !is_stride(y_stride, w.n)) {
    return kBadSize;
  }
  if (!is_float(x_dtype) || !is_float(y_dtype)) return kBadDType;
  if (bias && !is_float(bias_dtype)) return kBadDType;
  if (m == 0) return kOk;
  if (!x || !y) return kNoArray;
  const Path* way = path_for(path);
  if (!way) return kBadPath;
  float* floats = scratch_of<float>(kScratchX, w.k);
  int32_t* active = scratch_of<int32_t>(kScratchActive, w.k);
  if (!floats || !active) return kNoMemory;
  const float* padded = nullptr;
  if (bias) {
    padded = padded_bias(bias, bias_dtype, w.n, round_up(w.n, kRows));
    if (!padded) return kNoMemory;
  }
  for (int64_t token = 0; token < m; ++token) {
    int64_t count = 0;
    for (int64_t c = 0; c < w.k; ++c) {
      const float value = load_as_float(x, token * x_stride + c, x_dtype);
      floats[count] = value;
      active[count] = static_cast<int32_t>(c);
      count += value != 0.0f;  // NaN, too, isn't 0
    }
    void* to = static_cast<char*>(y) + token * y_stride * item_size(y_dtype);
    const ColumnProduct p = {&w, active, floats, count, padded, to, y_dtype};
    const ParallelFor threads = count * w.n < kSerialWork ? nullptr : pool;
    int32_t done;
    if (w.packed) {
      auto multiply = [&](int64_t begin, int64_t end) { way->packed_columns(p, begin, end); };
      done = run(threads, w.panels(), 1, multiply);
    } else {
      auto multiply = [&](int64_t begin, int64_t end) {
        way->dense_columns(p, begin * kRows, min64(w.n, end * kRows));
      };
      done = run(threads, ceil_div(w.n, kRows), 16, multiply);
    }
    if (done != kOk) return done;
  }
  return kOk;
}

TILE_EXPORT int32_t columns_row(const Row* row, const void* x, void* y) {
  const ColumnWeight& w = *static_cast<const ColumnWeight*>(row->weight);
  return columns_linear(&w, kAnyPath, x, row->dtype, 1, w.k, row->bias, row->bias_dtype, y,
                        row->dtype, w.n, row->pool);
}
