// tile: the layout of a sparse weight in memory, and what the instruction set files share.
//
// A weight W[N][K] (y = x W^T) is cut into tiles of 16 output rows and, inside a tile, into pairs
// of columns. A pair has a 32-bit mask: bit 2*r + c says that row r of the tile keeps column
// 2*p + c. The kept values follow in the order of the bits, pair after pair, tile after tile.
//
//   masks       u32[tiles][pairs]      tiles = ceil(N/16), pairs = ceil(K/2)
//   values      V[count] + 64 bytes    fp32, bf16, fp16, int8 or int4: value i of int4 is nibble
//                                      i % 2 of byte i / 2, two's complement, tiles without gaps
//   tile_base   u64[tiles + 1]         index of each tile's first value; the last one is `count`
//   block_off   u32[tiles][blocks]     index, from the tile's base, of every 256th column
//   scales      f32[tiles][groups][16] int8 and int4 only: W = scale * q, groups along K
//
// Why tiles: expanding one mask gives 16 outputs of one column in vector lanes. They are multiplied
// by a broadcast x[k] and added, so there is no horizontal sum and x is read N/16 times, not N.
// Why pairs: 32 expanded 16-bit values are 16 dwords holding (column 2p, column 2p+1) of one row.
// For bf16 a shift and an `and` turn them into two fp32 vectors, rows in order, without a single
// lane-crossing shuffle; and the same 64 bytes are one row of an AMX bf16 operand (the VNNI form).
// Why a 64-bit base and 32-bit offsets: N*K may exceed 2^32, 16*K may not; the offsets let a tile be
// split along K. Why 64 bytes after the values: the decoders load whole vectors from the next value
// on and so read up to one vector beyond the last.
//
// Pruned weights are zeros in the lanes, and they are multiplied: 0 * inf is NaN, as in F.linear.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tiles {

constexpr int64_t kRows = 16;         // outputs of a tile
constexpr int64_t kBlockPairs = 128;  // pairs between two entries of block_off
constexpr int64_t kValuePadding = 64;  // bytes readable after the last value
constexpr int64_t kMaxDim = int64_t{1} << 27;  // 16 * K fits 32 bits, N * K fits 63
constexpr int64_t kMaxStride = int64_t{1} << 33;  // kMaxDim rows of it and 4 bytes an item fit 63

enum DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3, kI4 = 4 };

// Not of int4, whose items are no bytes.
inline int64_t item_size(int32_t dtype) { return dtype == kF32 ? 4 : dtype == kI8 ? 1 : 2; }
constexpr bool has_scales(int32_t dtype) { return dtype == kI8 || dtype == kI4; }

// Of any a >= 0 and b >= 1: no sum can overflow.
inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t values_size(int32_t dtype, int64_t count) {
  return dtype == kI4 ? ceil_div(count, 2) : count * item_size(dtype);
}

// A pointer into int4 values.
struct Nibbles {
  const uint8_t* bytes;
  int64_t at;

  const uint8_t* byte() const { return bytes + (at >> 1); }
  bool odd() const { return (at & 1) != 0; }
  Nibbles operator+(int64_t count) const { return {bytes, at + count}; }
  Nibbles& operator+=(int64_t count) {
    at += count;
    return *this;
  }
};

// How values are pointed to while they are decoded.
template <int32_t D>
struct ValuesOf {
  using type = const uint16_t*;
};
template <>
struct ValuesOf<kF32> {
  using type = const float*;
};
template <>
struct ValuesOf<kI8> {
  using type = const int8_t*;
};
template <>
struct ValuesOf<kI4> {
  using type = Nibbles;
};
template <int32_t D>
using Values = typename ValuesOf<D>::type;

inline const char* address_of(const void* values) { return static_cast<const char*>(values); }
inline const char* address_of(Nibbles values) { return address_of(values.byte()); }

// Part of the C ABI: library.py mirrors the fields.
struct Weight {
  int64_t n, k;
  const uint32_t* masks;
  const uint64_t* tile_base;
  const uint32_t* block_off;
  const void* values;
  const float* scales;   // null unless int8 or int4
  int64_t value_bytes;   // size of the values buffer, padding included
  int64_t group_size;    // columns that share a scale; >= k means one scale per row
  int32_t value_dtype;
  int32_t normal;        // tile_check's finding: no bf16 value is subnormal, infinite or NaN

  int64_t tiles() const { return ceil_div(n, kRows); }
  int64_t pairs() const { return (k + 1) / 2; }
  int64_t blocks() const { return ceil_div(pairs(), kBlockPairs); }
  int64_t groups() const { return has_scales(value_dtype) ? ceil_div(k, group_size) : 1; }
  const uint32_t* tile_masks(int64_t tile) const { return masks + tile * pairs(); }
  template <int32_t D>
  Values<D> tile_values(int64_t tile) const {
    const auto first = static_cast<int64_t>(tile_base[tile]);
    if constexpr (D == kI4) {
      return {static_cast<const uint8_t*>(values), first};
    } else {
      return static_cast<Values<D>>(values) + first;
    }
  }
};

// One product y[M][N] = x[M][K] W^T + bias. Rows of x and y are contiguous, their strides in items.
struct Product {
  const Weight* weight;
  const void* x;
  int64_t x_stride;
  int32_t x_dtype;
  int32_t y_dtype;
  void* y;
  int64_t y_stride;
  const float* bias;  // null, or fp32[tiles * 16]
  int64_t m;
  // Filled by the path: x in the form its kernels read.
  void* packed_x;
  int64_t chunk;
};

// y[N] = W x for a dense weight W[N][K] of bf16 or fp16. Rows of W are contiguous, their stride in
// items.
struct DenseProduct {
  int64_t k;
  const void* w;
  int64_t w_stride;
  int32_t w_dtype;
  const float* x;
  void* y;
  int32_t y_dtype;
};

// A weight held by column: the dense W'[K][N], or packed, panel after panel of rows. A panel is one tile
// of the layout above: its column panel_rows / 16 * c + t has the weights of 16 of its rows, from 16 t
// on, in column c. So a pair of columns is 32 rows of one. Part of the C ABI: columns/weight.py mirrors
// the fields.
struct ColumnWeight {
  int64_t n, k;
  const void* dense;       // null if the weight is packed
  const Weight* packed;
  const int32_t* offsets;  // [panels][K], of each column's first value from the panel's
  int64_t panel_rows;      // a multiple of 32
  int32_t dense_dtype;

  int64_t panels() const { return ceil_div(n, panel_rows); }
  int64_t panel_pairs() const { return panel_rows / 32; }
};

constexpr int64_t kMostPanelRows = 2048;  // whose sums take 8 KB

// y[N] = W x + bias for one token.
struct ColumnProduct {
  const ColumnWeight* weight;
  const int32_t* active;  // the columns whose x isn't 0
  const float* x;         // of those
  int64_t count;
  const float* bias;  // null, or fp32[N rounded up to 16]
  void* y;
  int32_t y_dtype;
};

struct IntegerPath;

// A path is one instruction set's way through the product. Work is split over token chunks while x
// is packed and over tiles of outputs afterwards, never along K, so that the sum that makes an
// output doesn't depend on the number of threads.
struct Path {
  const char* name;
  bool (*available)();
  bool (*fits)(const Product&);
  // Chooses the chunk and says how many bytes packed_x needs (0: x is read where it lies).
  int64_t (*plan)(Product&);
  int64_t (*pack_units)(const Product&);
  void (*pack_x)(const Product&, int64_t begin, int64_t end);
  // Tiles a thread should take at least, so that it decodes whole groups.
  int64_t (*grain)(const Product&);
  void (*multiply)(const Product&, int64_t tile_begin, int64_t tile_end);
  // Dense rows of tiles [begin, end) into out[(end-begin)*16][stride], or transposed into
  // out[K][stride]; rows beyond n are left out.
  void (*decode)(const Weight&, int64_t tile_begin, int64_t tile_end, void* out, int32_t dtype,
                 int64_t stride, bool transposed);
  // Rows [begin, end) of a dense product.
  void (*dense_row)(const DenseProduct&, int64_t begin, int64_t end);
  // Rows [begin, end), or panels, of a product with a weight held by column.
  void (*dense_columns)(const ColumnProduct&, int64_t begin, int64_t end);
  void (*packed_columns)(const ColumnProduct&, int64_t begin, int64_t end);
  // Products of codes and rounded activations, see integer.h; null: as the next lower path.
  const IntegerPath* integer;
};

extern const Path kScalarPath, kAvx2Path, kAvxVnniPath, kAvx512Path, kAvx512Vbmi2Path, kAmxPath,
    kNeonPath, kNeonDotPath;

// A path that differs in its name and its integer products alone. Outside of an instruction set's
// code, since it runs when the library is loaded, on any CPU.
inline Path with_integers(Path path, const char* name, bool (*available)(),
                          const IntegerPath* integer) {
  path.name = name;
  path.available = available;
  path.integer = integer;
  return path;
}

// A thread's scratch memory, 64-byte aligned, kept between calls because asking the system for
// fresh pages costs more than a small product. Null when there is no memory.
enum ScratchSlot {
  kScratchX, kScratchBias, kScratchTile, kScratchSum, kScratchActive, kScratchSlots
};
void* scratch(ScratchSlot slot, int64_t bytes);
template <class T>
T* scratch_of(ScratchSlot slot, int64_t count) {
  return static_cast<T*>(scratch(slot, count * static_cast<int64_t>(sizeof(T))));
}
// Kernels run inside the pool's callbacks and can't return a code: they leave it here.
void report_no_memory();

}  // namespace tiles
