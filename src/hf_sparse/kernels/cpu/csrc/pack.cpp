// From the file's layout to tile and back, and the proof that a weight in the tile layout is sound.
//
// The file's layout is a row-major bitmask, u8[N][ceil(K/8)], lowest bit first, and the kept values
// in row-major order. A tile is packed by 16 cursors that walk its rows side by side.
//
// The kernels trust masks and offsets, so tile_check must have accepted a weight before it is
// multiplied: that is what keeps a tampered file from making them read out of bounds.
#include <cstring>
#include <new>
#include <vector>

#include "abi.h"
#include "convert.h"

namespace tiles {
namespace {

// What a packed weight is written to.
struct Target {
  uint32_t* masks;
  uint64_t* tile_base;
  uint32_t* block_off;
  void* values;
  int64_t value_bytes;
};

template <class T>
bool is_zero(T bits) {
  if (sizeof(T) == 1) return bits == 0;
  return static_cast<T>(bits << 1) == 0;  // both zeros of a float
}

// No bf16 value is subnormal, infinite or NaN; other dtypes don't matter to anyone.
bool are_normal(const Weight& w, int64_t count) {
  if (w.value_dtype != kBF16) return true;
  const auto* values = static_cast<const uint16_t*>(w.values);
  uint16_t odd = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto size = static_cast<uint16_t>(values[i] & 0x7fffu);
    odd = static_cast<uint16_t>(odd | (size >= 0x7f80u) | (size != 0 && size < 0x80u));
  }
  return odd == 0;
}

// Rows of a tile as cursors: next(r, pair) gives the two mask bits of a row and its kept values.
template <class T>
struct BitmaskRows {
  const uint8_t* bitmask;
  const T* values;
  int64_t row_bytes, count;
  const std::vector<int64_t>& row_start;
  int64_t cursor[kRows];
  int64_t first_row;

  void begin(int64_t row, int64_t rows) {
    first_row = row;
    for (int64_t r = 0; r < rows; ++r) cursor[r] = row_start[static_cast<size_t>(row + r)];
  }
  uint32_t next(int64_t r, int64_t pair, T* out) {
    const uint8_t byte = bitmask[(first_row + r) * row_bytes + pair / 4];
    const uint32_t bits = byte >> (pair % 4 * 2) & 3u;
    // Without branches, which would be mispredicted half of the time: both are copied, the caller
    // keeps as many as there are bits.
    const uint32_t kept = (bits & 1u) + (bits >> 1);
    out[0] = values[min64(cursor[r], count - 1)];
    out[1] = values[min64(cursor[r] + 1, count - 1)];
    cursor[r] += kept;
    return bits;
  }
};

template <class T>
struct DenseRows {
  const T* dense;
  int64_t stride, k, first_row;

  void begin(int64_t row, int64_t) { first_row = row; }
  uint32_t next(int64_t r, int64_t pair, T* out) {
    const T* at = dense + (first_row + r) * stride + 2 * pair;
    const T a = at[0], b = 2 * pair + 1 < k ? at[1] : T{0};
    const uint32_t keep_a = !is_zero(a), keep_b = !is_zero(b);
    out[0] = keep_a ? a : b;
    out[1] = b;
    return keep_a | keep_b << 1;
  }
};

template <class T, class Rows>
void pack_tile(int64_t n, int64_t k, int64_t tile, Rows rows, const Target& to) {
  const int64_t pairs = (k + 1) / 2, blocks = ceil_div(pairs, kBlockPairs);
  const int64_t height = min64(kRows, n - tile * kRows);
  uint32_t* masks = to.masks + tile * pairs;
  T* values = static_cast<T*>(to.values) + to.tile_base[tile];
  uint32_t written = 0;
  rows.begin(tile * kRows, height);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (pair % kBlockPairs == 0) to.block_off[tile * blocks + pair / kBlockPairs] = written;
    T kept[2 * kRows + 2];
    uint32_t mask = 0, count = 0;
    for (int64_t r = 0; r < height; ++r) {
      const uint32_t bits = rows.next(r, pair, kept + count);
      mask |= bits << 2 * r;
      count += (bits & 1u) + (bits >> 1);
    }
    masks[pair] = mask;
    // Exactly these: the next tile's values may already stand behind them.
    std::memcpy(values + written, kept, count * sizeof(T));
    written += count;
  }
}

int32_t finish_bases(int64_t n, int64_t size, const std::vector<int64_t>& row_start,
                     const Target& to) {
  const int64_t tiles = ceil_div(n, kRows), count = row_start.back();
  if (to.value_bytes < count * size + kValuePadding) return kBufferTooSmall;
  for (int64_t t = 0; t <= tiles; ++t) {
    to.tile_base[t] =
        static_cast<uint64_t>(row_start[static_cast<size_t>(min64(t * kRows, n))]);
  }
  std::memset(static_cast<uint8_t*>(to.values) + count * size, 0,
              static_cast<size_t>(to.value_bytes - count * size));
  return kOk;
}

template <class T>
int32_t pack_bitmask(int64_t n, int64_t k, const uint8_t* bitmask, const T* values,
                     int64_t value_count, const Target& to, ParallelFor pool) {
  const int64_t row_bytes = ceil_div(k, 8);
  std::vector<int64_t> row_start(static_cast<size_t>(n) + 1);
  for (int64_t r = 0; r < n; ++r) {
    const uint8_t* row = bitmask + r * row_bytes;
    if (k % 8 != 0 && row[row_bytes - 1] >> (k % 8) != 0) return kPaddingBits;
    const auto at = static_cast<size_t>(r);
    row_start[at + 1] = row_start[at] + count_bits(row, row_bytes);
  }
  if (row_start.back() != value_count) return kCountMismatch;
  const int32_t code = finish_bases(n, sizeof(T), row_start, to);
  if (code != kOk) return code;
  const T none{0};
  const bool empty = value_count == 0;
  const BitmaskRows<T> rows = {bitmask, empty ? &none : values, row_bytes, empty ? 1 : value_count,
                               row_start, {}, 0};
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) pack_tile<T>(n, k, t, rows, to);
  };
  return run(pool, ceil_div(n, kRows), 1, body);
}

template <class T>
int64_t count_row(const T* row, int64_t k) {
  int64_t count = 0;
  for (int64_t c = 0; c < k; ++c) count += !is_zero(row[c]);
  return count;
}

template <class T>
int32_t pack_dense(int64_t n, int64_t k, const T* dense, int64_t stride, const Target& to,
                   ParallelFor pool) {
  std::vector<int64_t> row_start(static_cast<size_t>(n) + 1);
  for (int64_t r = 0; r < n; ++r) {
    const auto at = static_cast<size_t>(r);
    row_start[at + 1] = row_start[at] + count_row(dense + r * stride, k);
  }
  const int32_t code = finish_bases(n, sizeof(T), row_start, to);
  if (code != kOk) return code;
  const DenseRows<T> rows = {dense, stride, k, 0};
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) pack_tile<T>(n, k, t, rows, to);
  };
  return run(pool, ceil_div(n, kRows), 1, body);
}

// Back to row-major: first the bits, then each row's values from its start.
template <class T>
int32_t unpack(const Weight& w, uint8_t* bitmask, T* values, ParallelFor pool) {
  const int64_t row_bytes = ceil_div(w.k, 8), pairs = w.pairs();
  std::memset(bitmask, 0, static_cast<size_t>(w.n * row_bytes));
  auto write_bits = [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const uint32_t* masks = w.tile_masks(tile);
      const int64_t height = min64(kRows, w.n - tile * kRows);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        for (int64_t r = 0; r < height; ++r) {
          bitmask[(tile * kRows + r) * row_bytes + pair / 4] |=
              static_cast<uint8_t>((masks[pair] >> 2 * r & 3u) << (pair % 4 * 2));
        }
      }
    }
  };
  int32_t code = run(pool, w.tiles(), 1, write_bits);
  if (code != kOk) return code;
  std::vector<int64_t> row_start(static_cast<size_t>(w.tiles() * kRows));
  int64_t count = 0;
  for (int64_t r = 0; r < w.n; ++r) {
    row_start[static_cast<size_t>(r)] = count;
    count += count_bits(bitmask + r * row_bytes, row_bytes);
  }
  auto write_values = [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const T* from = static_cast<const T*>(w.values) + w.tile_base[tile];
      int64_t* cursor = row_start.data() + tile * kRows;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        for (uint32_t left = w.tile_masks(tile)[pair]; left != 0; left &= left - 1) {
          values[cursor[__builtin_ctz(left) / 2]++] = *from++;
        }
      }
    }
  };
  return run(pool, w.tiles(), 1, write_values);
}

// int4 is made of packed int8, by the caller, who keeps what the values are.
bool packs(int32_t dtype) { return dtype >= kF32 && dtype <= kI8; }

// vector's constructor throws when there is no memory, and nothing may leave through the C ABI.
template <class F>
int32_t guarded(F body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace

int32_t check_shape(const Weight& w) {
  if (!is_dim(w.n) || !is_dim(w.k)) return kBadSize;
  if (!packs(w.value_dtype) && w.value_dtype != kI4) return kBadDType;
  if (has_scales(w.value_dtype)) {
    if (!w.scales) return kBadGroup;
    if (w.group_size < 1 || (w.group_size < w.k && w.group_size % 2 != 0)) return kBadGroup;
  }
  if (!w.masks || !w.tile_base || !w.block_off || !w.values) return kNoArray;
  return kOk;
}

}  // namespace tiles

using namespace tiles;

TILE_EXPORT int32_t tile_pack_bitmask(int64_t n, int64_t k, const uint8_t* bitmask,
                                    const void* values, int64_t value_count, int32_t dtype,
                                    uint32_t* masks, uint64_t* tile_base, uint32_t* block_off,
                                    void* packed, int64_t packed_bytes, ParallelFor pool) {
  if (!is_dim(n) || !is_dim(k) || value_count < 0 || value_count > n * k) return kBadSize;
  if (!packs(dtype)) return kBadDType;
  if (!bitmask || (!values && value_count > 0)) return kNoArray;
  if (!masks || !tile_base || !block_off || !packed) return kNoArray;
  const Target to = {masks, tile_base, block_off, packed, packed_bytes};
  return guarded([&] {
    switch (item_size(dtype)) {
      case 4:
        return pack_bitmask(n, k, bitmask, static_cast<const uint32_t*>(values), value_count, to,
                            pool);
      case 2:
        return pack_bitmask(n, k, bitmask, static_cast<const uint16_t*>(values), value_count, to,
                            pool);
      default:
        return pack_bitmask(n, k, bitmask, static_cast<const uint8_t*>(values), value_count, to,
                            pool);
    }
  });
}

// Nonzero items of dense[n][stride]: the values that tile_pack_dense will keep; -1 if there is no
// such array.
TILE_EXPORT int64_t tile_count_dense(int64_t n, int64_t k, const void* dense, int64_t stride,
                                   int32_t dtype) {
  if (!is_dim(n) || !is_dim(k) || !is_stride(stride, k) || !packs(dtype) || !dense) return -1;
  int64_t count = 0;
  for (int64_t r = 0; r < n; ++r) {
    switch (item_size(dtype)) {
      case 4: count += count_row(static_cast<const uint32_t*>(dense) + r * stride, k); break;
      case 2: count += count_row(static_cast<const uint16_t*>(dense) + r * stride, k); break;
      default: count += count_row(static_cast<const uint8_t*>(dense) + r * stride, k);
    }
  }
  return count;
}

TILE_EXPORT int32_t tile_pack_dense(int64_t n, int64_t k, const void* dense, int64_t stride,
                                  int32_t dtype, uint32_t* masks, uint64_t* tile_base,
                                  uint32_t* block_off, void* packed, int64_t packed_bytes,
                                  ParallelFor pool) {
  if (!is_dim(n) || !is_dim(k) || !is_stride(stride, k)) return kBadSize;
  if (!packs(dtype)) return kBadDType;
  if (!dense || !masks || !tile_base || !block_off || !packed) return kNoArray;
  const Target to = {masks, tile_base, block_off, packed, packed_bytes};
  return guarded([&] {
    switch (item_size(dtype)) {
      case 4: return pack_dense(n, k, static_cast<const uint32_t*>(dense), stride, to, pool);
      case 2: return pack_dense(n, k, static_cast<const uint16_t*>(dense), stride, to, pool);
      default: return pack_dense(n, k, static_cast<const uint8_t*>(dense), stride, to, pool);
    }
  });
}

TILE_EXPORT int32_t tile_unpack(const Weight* weight, uint8_t* bitmask, void* values,
                              ParallelFor pool) {
  const int32_t code = check_shape(*weight);
  if (code != kOk) return code;
  if (!packs(weight->value_dtype)) return kBadDType;
  if (!bitmask || (!values && weight->tile_base[weight->tiles()] > 0)) return kNoArray;
  return guarded([&] {
    switch (item_size(weight->value_dtype)) {
      case 4: return unpack(*weight, bitmask, static_cast<uint32_t*>(values), pool);
      case 2: return unpack(*weight, bitmask, static_cast<uint16_t*>(values), pool);
      default: return unpack(*weight, bitmask, static_cast<uint8_t*>(values), pool);
    }
  });
}

TILE_EXPORT int32_t tile_check(Weight* weight) {
  Weight& w = *weight;
  w.normal = 0;
  const int32_t code = check_shape(w);
  if (code != kOk) return code;
  const int64_t pairs = w.pairs(), blocks = w.blocks();
  const uint32_t odd_columns = 0xaaaaaaaau;
  uint64_t count = 0;
  for (int64_t tile = 0; tile < w.tiles(); ++tile) {
    if (w.tile_base[tile] != count) return kBadOffsets;
    const uint32_t* masks = w.tile_masks(tile);
    const int64_t height = min64(kRows, w.n - tile * kRows);
    const uint32_t outside = height == kRows ? 0u : ~0u << 2 * height;
    uint32_t in_tile = 0;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      if (pair % kBlockPairs == 0 && w.block_off[tile * blocks + pair / kBlockPairs] != in_tile) {
        return kBadOffsets;
      }
      const uint32_t beyond_k = 2 * pair + 1 < w.k ? 0u : odd_columns;
      if ((masks[pair] & (outside | beyond_k)) != 0) return kPaddingBits;
      in_tile += static_cast<uint32_t>(__builtin_popcount(masks[pair]));
    }
    count += in_tile;
  }
  if (w.tile_base[w.tiles()] != count) return kBadOffsets;
  const int64_t needed = values_size(w.value_dtype, static_cast<int64_t>(count)) + kValuePadding;
  if (w.value_bytes < needed) return kBufferTooSmall;
  w.normal = are_normal(w, static_cast<int64_t>(count)) ? 1 : 0;
  return kOk;
}
