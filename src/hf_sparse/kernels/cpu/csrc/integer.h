// octets: the layout of codes of 8 or 4 bits that are multiplied by activations rounded to int8.
//
// A weight W[N][K] of codes (W = scale * code) is cut into tiles of 8 output rows, a tile into units
// of 8 columns, a unit into two steps: its rows 0-3 and 4-7. So a step is 4 octets, an octet the 8
// weights of a row in 8 columns, and bit c of its mask says that column 8 u + c is kept.
//
//   masks       u8[tiles][units][8]      an octet's mask for each row of the tile; none if `kept` is 8
//   values      u8[...] + 64 bytes       the kept codes, step after step, tile after tile
//   tile_base   u64[tiles + 1]           first byte of each tile's values; the last is their end
//   scales      bf16[tiles][groups][8]   as the file has them, groups of `group_size` columns
//
// A step's codes are those of its octets in order, `low` of the first two, `high` of the others.
//   8 bits: low + high bytes, one after another.
//   4 bits: max(low, high) bytes, two's complement: the i-th of the first two octets is the low
//   nibble of byte i, the i-th of the others the high one. So both halves of a vector of 32 bytes are
//   made by a shift, and a step starts at a whole byte. It costs 0.02 bytes a weight at 50 %.
//
// `kept` says how many of each octet are kept: 0, as many as the mask says; 1 to 7, so many (2:4 and
// 4:8 are 4), and then nothing is counted while decoding; 8, all, which is plain quantisation.
//
// Why 8 columns a row: n:m of 4 and of 8 both keep a fixed count of them; masks are the bytes of the
// file's; one broadcast of 8 activations serves both steps; and sums of a row lie in two neighbouring
// lanes, added once a block.
//
// Activations: each token's x is cut into blocks of columns (`block_columns`), and in each
// x ~ step * q, q = -127..127, step = max |x| / 127. Small blocks, because models have single inputs
// that are a hundred times larger than the others, and in their block little is left of those. A block's
// sums of code * q are exact. Times the step they are added in fp32, blocks in order, over a span of
// columns that have one scale per row, and scaled there.
// So the result depends on neither threads nor, but for scalar code, whose sums aren't fused, on the
// instruction set. What is lost is the rounding of x: |error| <= sum over blocks of step / 2 * sum |W|,
// and fp32's. A block with an infinity or a NaN makes its token's outputs NaN.
#pragma once

#include "tiles.h"

namespace tiles {

constexpr int64_t kOctet = 8;  // rows of a tile, columns of a unit
constexpr int64_t kStepCodes = 32;
constexpr int64_t kLargestBlock = 32;      // columns whose x share a step
constexpr int64_t kLargestSpan = 128;      // columns that are scaled together
constexpr float kLeastLargest = 0x1p-100f;  // of |x| in a block: smaller ones count as that

enum Bits : int32_t { kCodes4 = 4, kCodes8 = 8 };
// What `kept` may be; kKeptFixed stands for 1 to 7 where code is chosen by it.
enum Kept : int32_t { kKeptAny = 0, kKeptFixed = 1, kKeptAll = 8 };

// Part of the C ABI: integer/weight.py mirrors the fields.
struct IntegerWeight {
  int64_t n, k;
  const uint8_t* masks;
  const uint64_t* tile_base;
  const uint8_t* values;
  const uint16_t* scales;
  int64_t value_bytes;  // size of the values buffer, padding included
  int64_t group_size;   // columns that share a scale, a multiple of 8; >= k means one scale per row
  int32_t bits;
  int32_t kept;

  int64_t tiles() const { return ceil_div(n, kOctet); }
  int64_t units() const { return ceil_div(k, kOctet); }
  int64_t groups() const { return ceil_div(k, group_size); }
  // The largest power of two that divides the groups, so that a span has one scale per row.
  int64_t span_columns() const {
    if (group_size >= k) return kLargestSpan;
    return min64(kLargestSpan, group_size & -group_size);
  }
  int64_t span_units() const { return span_columns() / kOctet; }
  int64_t spans() const { return ceil_div(units(), span_units()); }
  int64_t block_columns() const { return min64(kLargestBlock, span_columns()); }
  int64_t block_units() const { return block_columns() / kOctet; }
  int64_t span_blocks() const { return span_columns() / block_columns(); }
  const uint8_t* tile_masks(int64_t tile) const { return masks + tile * units() * kOctet; }
  const uint8_t* tile_values(int64_t tile) const { return values + tile_base[tile]; }
  const uint16_t* span_scales(int64_t tile, int64_t span) const {
    const int64_t group = group_size >= k ? 0 : span * span_columns() / group_size;
    return scales + (tile * groups() + group) * kOctet;
  }
};

// Bytes of a step's codes.
inline int64_t step_bytes(int32_t bits, int64_t low, int64_t high) {
  if (bits == kCodes8) return low + high;
  return low > high ? low : high;
}

// The codes of a step, zeros where nothing is kept; where the next step begins. In plain loops.
inline const uint8_t* decode_step(const IntegerWeight& w, const uint8_t* values,
                                  const uint8_t* masks, int8_t* codes) {
  int64_t kept[2] = {0, 0};
  for (int64_t i = 0; i < kStepCodes; ++i) {
    if (w.kept != kKeptAll) kept[i / 16] += masks[i / 8] >> i % 8 & 1;
  }
  if (w.kept == kKeptAll) kept[0] = kept[1] = 16;
  int64_t next[2] = {0, w.bits == kCodes8 ? kept[0] : 0};
  for (int64_t i = 0; i < kStepCodes; ++i) {
    codes[i] = 0;
    if (w.kept != kKeptAll && (masks[i / 8] >> i % 8 & 1) == 0) continue;
    const uint8_t byte = values[next[i / 16]++];
    const auto top = static_cast<int8_t>(i < 16 ? byte << 4 : byte & 0xf0);
    codes[i] = static_cast<int8_t>(w.bits == kCodes8 ? static_cast<int8_t>(byte) : top / 16);
  }
  return values + step_bytes(w.bits, kept[0], kept[1]);
}

// A block of x: the step, and the sum of q, which takes off what was added to codes to make them
// unsigned.
struct RoundedBlock {
  float step;
  int32_t sum;
};

// y[M][N] = x[M][K] W^T + bias. Rows of x and y are contiguous, their strides in items.
struct IntegerProduct {
  const IntegerWeight* weight;
  const void* x;
  int64_t x_stride;
  int32_t x_dtype;
  int32_t y_dtype;
  void* y;
  int64_t y_stride;
  const float* bias;  // null, or fp32[tiles * 8]
  int64_t m;
  // x rounded: q of [span][token][column of the span], zeros beyond K, and [span][token][block of it].
  int8_t* q;
  RoundedBlock* blocks;

  int8_t* span_q(int64_t span, int64_t token) const {
    return q + (span * m + token) * weight->span_columns();
  }
  RoundedBlock* span_blocks(int64_t span, int64_t token) const {
    return blocks + (span * m + token) * weight->span_blocks();
  }
};

// An instruction set's way. Each output is summed by one thread, in one order.
struct IntegerPath {
  void (*round_x)(const IntegerProduct&, int64_t token_begin, int64_t token_end);
  void (*multiply)(const IntegerProduct&, int64_t tile_begin, int64_t tile_end);
};

extern const IntegerPath kAmxIntegers;

}  // namespace tiles
