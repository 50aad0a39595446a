// What the drivers of the native library share: its C ABI, chance, and buffers of exact size.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "abi.h"
#include "convert.h"
#include "integer.h"

using namespace tiles;

extern "C" {
int32_t tile_path_count();
const char* tile_path_name(int32_t);
int32_t tile_path_available(int32_t);
const char* tile_message(int32_t);
int32_t tile_check(Weight*);
int64_t tile_count_dense(int64_t, int64_t, const void*, int64_t, int32_t);
int32_t tile_pack_dense(int64_t, int64_t, const void*, int64_t, int32_t, uint32_t*, uint64_t*,
                        uint32_t*, void*, int64_t, ParallelFor);
int32_t tile_pack_bitmask(int64_t, int64_t, const uint8_t*, const void*, int64_t, int32_t,
                          uint32_t*, uint64_t*, uint32_t*, void*, int64_t, ParallelFor);
int32_t tile_unpack(const Weight*, uint8_t*, void*, ParallelFor);
int32_t tile_linear(const Weight*, int32_t, const void*, int32_t, int64_t, int64_t, const void*,
                    int32_t, void*, int32_t, int64_t, ParallelFor);
int32_t whole_keep_highest(int64_t, int64_t, const float*, int64_t, uint8_t*, ParallelFor);
int32_t whole_nonzero_bits(int64_t, int64_t, const void*, int64_t, int32_t, uint8_t*, ParallelFor);
int32_t whole_kept_items(int64_t, int64_t, const void*, int64_t, const uint8_t*, int64_t, void*,
                         ParallelFor);
int32_t whole_zero_outside(int64_t, const void*, int64_t, const uint8_t*, void*, ParallelFor);
int32_t whole_rounding_errors(int64_t, int64_t, int64_t, const float*, const float*, const int16_t*,
                              int32_t, const float*, float*, ParallelFor);
int32_t whole_all_finite(int64_t, const void*, int32_t);
int32_t tile_row(const Row*, const void*, void*);
int32_t integer_row(const Row*, const void*, void*);
int32_t tile_decode(const Weight*, int32_t, int64_t, int64_t, void*, int32_t, int64_t, int32_t,
                    ParallelFor);
int32_t integer_measure(int64_t, int64_t, const int8_t*, int32_t, int32_t, uint64_t*, ParallelFor);
int32_t integer_pack(int64_t, int64_t, const int8_t*, int32_t, int32_t, const uint64_t*, uint8_t*,
                     uint8_t*, int64_t, ParallelFor);
int32_t integer_unpack(const IntegerWeight*, int8_t*, ParallelFor);
int32_t integer_check(const IntegerWeight*);
int32_t integer_linear(const IntegerWeight*, int32_t, const void*, int32_t, int64_t, int64_t,
                       const void*, int32_t, void*, int32_t, int64_t, ParallelFor);
int32_t columns_index(const ColumnWeight*, int32_t*);
int32_t columns_check(const ColumnWeight*);
int32_t columns_linear(const ColumnWeight*, int32_t, const void*, int32_t, int64_t, int64_t,
                       const void*, int32_t, void*, int32_t, int64_t, ParallelFor);
int32_t columns_row(const Row*, const void*, void*);
int32_t tile_dense_row(int64_t, int64_t, const void*, int32_t, int64_t, int32_t, const void*,
                       int32_t, void*, int32_t, ParallelFor);
}

inline std::mt19937_64 rng(1);

inline int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}
inline double normal() { return std::normal_distribution<double>()(rng); }
inline bool chance(double p) { return std::bernoulli_distribution(p)(rng); }

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}
inline void expect(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

// Exactly `bytes`, and aligned no better than malloc or the offset makes it.
struct Bytes {
  explicit Bytes(int64_t count) : data(static_cast<uint8_t*>(std::malloc(count ? count : 1))) {}
  ~Bytes() { std::free(data); }
  Bytes(const Bytes&) = delete;
  uint8_t* data;
};

// Random codes of 8 or 4 bits in the integer layout, in buffers of exact size.
struct IntegerCase {
  int64_t n, k;
  int32_t bits = chance(0.5) ? kCodes8 : kCodes4;
  int32_t kept = static_cast<int32_t>(chance(0.5) ? uniform(0, 8) : chance(0.5) ? 0 : 8);
  int64_t group, tiles, units, groups, bytes;
  Bytes codes, base, masks, values, scales;

  IntegerCase(int64_t rows, int64_t columns)
      : n(rows), k(columns), group(chance(0.3) ? k : 8 * uniform(1, 40)),
        tiles(ceil_div(n, kOctet)), units(ceil_div(k, kOctet)), groups(ceil_div(k, group)),
        codes(n * k), base((tiles + 1) * 8), masks(tiles * units * kOctet),
        values(fill_and_measure()), scales(tiles * groups * kOctet * 2) {
    auto* half = reinterpret_cast<uint16_t*>(scales.data);
    for (int64_t i = 0; i < tiles * groups * kOctet; ++i) {
      half[i] = static_cast<uint16_t>(0x3c00 + uniform(0, 200));  // 0.008 to 0.02
    }
    expect(integer_pack(n, k, code(0), bits, kept, bases(), masks.data, values.data, bytes,
                        nullptr) == kOk,
           "integer_pack");
  }
  int8_t* code(int64_t i) { return reinterpret_cast<int8_t*>(codes.data) + i; }
  uint64_t* bases() { return reinterpret_cast<uint64_t*>(base.data); }
  IntegerWeight weight() {
    return {n, k, kept == kKeptAll ? nullptr : masks.data, bases(), values.data,
            reinterpret_cast<uint16_t*>(scales.data), bytes, group, bits, kept};
  }

 private:
  int64_t fill_and_measure() {
    const int64_t top = bits == kCodes4 ? 7 : 127;
    const double density = chance(0.2) ? 0.0 : 0.5;
    for (int64_t r = 0; r < n; ++r) {
      int64_t left = 0;
      for (int64_t c = 0; c < k; ++c) {
        if (c % kOctet == 0) left = kept == kKeptAny ? kOctet : kept;
        const bool zero = left == 0 || !chance(kept == kKeptAny ? density : 0.9);
        *code(r * k + c) = zero ? int8_t{0} : static_cast<int8_t>(uniform(-top - 1, top));
        left -= *code(r * k + c) != 0;
      }
    }
    expect(integer_measure(n, k, code(0), bits, kept, bases(), nullptr) == kOk, "integer_measure");
    bytes = static_cast<int64_t>(bases()[tiles]) + kValuePadding;
    return bytes;
  }
};

// A random weight by column, dense or in panels, in buffers of exact size.
struct ColumnCase {
  int64_t n, k;
  int32_t dtype = static_cast<int32_t>(uniform(0, 2));
  bool packs = chance(0.6);
  int64_t panel_rows = packs ? 32 * uniform(1, 4) : 0;
  int64_t panels = packs ? ceil_div(n, panel_rows) : 0;
  int64_t rows = panels * kRows, columns = packs ? k * (panel_rows / kRows) : 0;
  int64_t pairs = (columns + 1) / 2, blocks = ceil_div(pairs, kBlockPairs);
  Bytes transposed, tiled, masks, base, off, values, offsets;
  int64_t bytes;
  Weight packed;

  ColumnCase(int64_t outputs, int64_t inputs)
      : n(outputs), k(inputs), transposed(n * k * item_size(dtype)),
        tiled(rows * columns * item_size(dtype)), masks(panels * pairs * 4),
        base((panels + 1) * 8), off(panels * blocks * 4), values(fill()),
        offsets(panels * k * 4) {
    auto* words = reinterpret_cast<uint32_t*>(masks.data);
    auto* bases = reinterpret_cast<uint64_t*>(base.data);
    auto* block_off = reinterpret_cast<uint32_t*>(off.data);
    packed = {rows, columns, words, bases, block_off, values.data, nullptr, bytes, columns, dtype, 0};
    if (!packs) return;
    expect(tile_pack_dense(rows, columns, tiled.data, columns, dtype, words, bases, block_off,
                           values.data, bytes, nullptr) == kOk, "pack of panels");
    expect(tile_check(&packed) == kOk, "check of panels");
    const ColumnWeight w = weight();
    expect(columns_index(&w, reinterpret_cast<int32_t*>(offsets.data)) == kOk, "columns_index");
  }
  ColumnWeight weight() const {
    return {n, k, packs ? nullptr : transposed.data, packs ? &packed : nullptr,
            reinterpret_cast<const int32_t*>(offsets.data), panel_rows, dtype};
  }
  double at(int64_t row, int64_t column) const {
    return load_as_float(transposed.data, column * n + row, dtype);
  }

 private:
  int64_t fill() {
    const double density = chance(0.2) ? 0.0 : 0.5;
    for (int64_t i = 0; i < rows * columns; ++i) store_from_float(tiled.data, i, dtype, 0.0f);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < k; ++c) {
        const float v = chance(density) ? static_cast<float>(normal()) : 0.0f;
        store_from_float(transposed.data, c * n + r, dtype, v);
        if (!packs) continue;
        const int64_t panel = r / panel_rows, within = r % panel_rows;
        const int64_t row = panel * kRows + within % kRows;
        const int64_t column = c * (panel_rows / kRows) + within / kRows;
        store_from_float(tiled.data, row * columns + column, dtype, v);
      }
    }
    const int64_t count = packs ? tile_count_dense(rows, columns, tiled.data, columns, dtype) : 0;
    bytes = count * item_size(dtype) + kValuePadding;
    return bytes;
  }
};
