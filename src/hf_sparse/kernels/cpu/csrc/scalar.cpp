// The path that every machine has, in plain loops: what the others are compared with, and what runs
// where there is no vector unit that we know. One tile at a time, one token at a time.
//
// The tile is expanded to 16 weights per column, zeros included, so that infinities and NaNs in x
// meet the pruned weights as they do in a dense product.
#include <cstring>

#include "convert.h"
#include "integer.h"
#include "tiles.h"

namespace tiles {
namespace {

bool available() { return true; }
bool fits(const Product&) { return true; }
int64_t plan(Product& p) {
  p.chunk = 1;
  return 0;
}
int64_t pack_units(const Product&) { return 0; }
void pack_x(const Product&, int64_t, int64_t) {}
int64_t grain(const Product&) { return 1; }

float scale_of(const Weight& w, int64_t tile, int64_t column, int64_t row) {
  if (!has_scales(w.value_dtype)) return 1.0f;
  return w.scales[(tile * w.groups() + column / w.group_size) * kRows + row];
}

void multiply(const Product& p, int64_t tile_begin, int64_t tile_end) {
  const Weight& w = *p.weight;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const uint32_t* masks = w.tile_masks(tile);
    const int64_t rows = min64(kRows, w.n - tile * kRows);
    for (int64_t m = 0; m < p.m; ++m) {
      int64_t next = static_cast<int64_t>(w.tile_base[tile]);
      float sum[kRows] = {};
      for (int64_t k = 0; k < w.k; k += 2) {
        const int64_t at = m * p.x_stride + k;
        const float x[2] = {load_as_float(p.x, at, p.x_dtype),
                            k + 1 < w.k ? load_as_float(p.x, at + 1, p.x_dtype) : 0.0f};
        const uint32_t mask = masks[k / 2];
        for (int bit = 0; bit < 32; ++bit) {
          const int row = bit / 2, c = bit % 2;
          float weight = 0.0f;
          if (mask >> bit & 1u) {
            weight = load_as_float(w.values, next++, w.value_dtype) *
                     scale_of(w, tile, k + c, row);
          }
          sum[row] += weight * x[c];
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t column = tile * kRows + row;
        const float bias = p.bias ? p.bias[column] : 0.0f;
        store_from_float(p.y, m * p.y_stride + column, p.y_dtype, sum[row] + bias);
      }
    }
  }
}

void decode(const Weight& w, int64_t tile_begin, int64_t tile_end, void* out, int32_t dtype,
            int64_t stride, bool transposed) {
  const int64_t row_stride = transposed ? 1 : stride, column_stride = transposed ? stride : 1;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const uint32_t* masks = w.tile_masks(tile);
    const int64_t rows = min64(kRows, w.n - tile * kRows);
    int64_t next = static_cast<int64_t>(w.tile_base[tile]);
    for (int64_t k = 0; k < w.k; k += 2) {
      const uint32_t mask = masks[k / 2];
      for (int bit = 0; bit < 32; ++bit) {
        const int64_t row = bit / 2, column = k + bit % 2;
        float weight = 0.0f;
        if (mask >> bit & 1u) {
          weight = load_as_float(w.values, next++, w.value_dtype) *
                   scale_of(w, tile, column, row);
        }
        if (row < rows && column < w.k) {
          const int64_t out_row = (tile - tile_begin) * kRows + row;
          store_from_float(out, out_row * row_stride + column * column_stride, dtype, weight);
        }
      }
    }
  }
}

void dense_row(const DenseProduct& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float sum = 0.0f;
    for (int64_t c = 0; c < p.k; ++c) {
      sum += load_as_float(p.w, row * p.w_stride + c, p.w_dtype) * p.x[c];
    }
    store_from_float(p.y, row, p.y_dtype, sum);
  }
}

void store_sums(const ColumnProduct& p, const float* sums, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    store_from_float(p.y, r, p.y_dtype, sums[r - begin] + (p.bias ? p.bias[r] : 0.0f));
  }
}

void dense_columns(const ColumnProduct& p, int64_t begin, int64_t end) {
  const ColumnWeight& w = *p.weight;
  for (int64_t first = begin; first < end; first += kMostPanelRows) {
    float sums[kMostPanelRows] = {};
    const int64_t last = min64(end, first + kMostPanelRows);
    for (int64_t at = 0; at < p.count; ++at) {
      for (int64_t r = first; r < last; ++r) {
        sums[r - first] += load_as_float(w.dense, p.active[at] * w.n + r, w.dense_dtype) * p.x[at];
      }
    }
    store_sums(p, sums, first, last);
  }
}

void packed_columns(const ColumnProduct& p, int64_t begin, int64_t end) {
  const ColumnWeight& w = *p.weight;
  const Weight& packed = *w.packed;
  for (int64_t panel = begin; panel < end; ++panel) {
    float sums[kMostPanelRows] = {};
    for (int64_t at = 0; at < p.count; ++at) {
      const int64_t column = p.active[at];
      int64_t next = static_cast<int64_t>(packed.tile_base[panel]) + w.offsets[panel * w.k + column];
      for (int64_t pair = 0; pair < w.panel_pairs(); ++pair) {
        const uint32_t mask = packed.tile_masks(panel)[column * w.panel_pairs() + pair];
        for (int bit = 0; bit < 32; ++bit) {
          float weight = 0.0f;
          if (mask >> bit & 1u) weight = load_as_float(packed.values, next++, packed.value_dtype);
          sums[pair * 32 + bit % 2 * kRows + bit / 2] += weight * p.x[at];
        }
      }
    }
    store_sums(p, sums, panel * w.panel_rows, min64(w.n, (panel + 1) * w.panel_rows));
  }
}

#include "integer_round.h"

void round_x(const IntegerProduct& p, int64_t begin, int64_t end) {
  round_tokens(p, begin, end, [](const void* x, int64_t at, int32_t dtype, float* out) {
    for (int64_t i = 0; i < 16; ++i) out[i] = load_as_float(x, at + i, dtype);
  });
}

// A block's exact sums of one step, for a tile's rows.
void add_step(const int8_t* codes, const int8_t* q, int64_t first_row, int32_t* sums) {
  for (int64_t i = 0; i < kStepCodes; ++i) sums[first_row + i / 8] += codes[i] * q[i % 8];
}

// A span's products, for the rows of a tile; where the values of the next one begin.
const uint8_t* multiply_span(const IntegerProduct& p, int64_t tile, int64_t span, int64_t token,
                             const uint8_t* values, float* total) {
  const IntegerWeight& w = *p.weight;
  float scaled[kOctet] = {};
  const int8_t* q = p.span_q(span, token);
  for (int64_t block = 0; block < w.span_blocks(); ++block) {
    int32_t sums[kOctet] = {};
    const int64_t first = span * w.span_units() + block * w.block_units();
    for (int64_t unit = first; unit < min64(w.units(), first + w.block_units()); ++unit, q += kOctet) {
      for (int64_t row = 0; row < kOctet; row += 4) {
        int8_t codes[kStepCodes];
        const uint8_t* masks =
            w.kept == kKeptAll ? values : w.tile_masks(tile) + unit * kOctet + row;
        values = decode_step(w, values, masks, codes);
        add_step(codes, q, row, sums);
      }
    }
    const float step = p.span_blocks(span, token)[block].step;
    for (int64_t r = 0; r < kOctet; ++r) scaled[r] += static_cast<float>(sums[r]) * step;
  }
  const uint16_t* scales = w.span_scales(tile, span);
  for (int64_t r = 0; r < kOctet; ++r) total[r] += scaled[r] * from_bf16(scales[r]);
  return values;
}

void multiply_integers(const IntegerProduct& p, int64_t tile_begin, int64_t tile_end) {
  const IntegerWeight& w = *p.weight;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t m = 0; m < p.m; ++m) {
      const uint8_t* values = w.tile_values(tile);
      float total[kOctet] = {};
      for (int64_t span = 0; span < w.spans(); ++span) {
        values = multiply_span(p, tile, span, m, values, total);
      }
      for (int64_t r = 0; r < min64(kOctet, w.n - tile * kOctet); ++r) {
        const int64_t column = tile * kOctet + r;
        const float bias = p.bias ? p.bias[column] : 0.0f;
        store_from_float(p.y, m * p.y_stride + column, p.y_dtype, total[r] + bias);
      }
    }
  }
}

constexpr IntegerPath kInteger = {round_x, multiply_integers};

}  // namespace

const Path kScalarPath = {"scalar",      available,      fits,     plan,   pack_units,
                          pack_x,        grain,          multiply, decode, dense_row,
                          dense_columns, packed_columns, &kInteger};

}  // namespace tiles
