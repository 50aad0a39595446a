// The integer layout: packed, unpacked, checked, and the product through the path that is best.
#include "integer.h"

#include <atomic>
#include <cstring>

#include "abi.h"
#include "convert.h"

namespace tiles {
namespace {

bool is_bits(int32_t bits) { return bits == kCodes4 || bits == kCodes8; }
bool is_kept(int32_t kept) { return kept >= kKeptAny && kept <= kKeptAll; }

int32_t check_shape(const IntegerWeight& w) {
  if (!is_dim(w.n) || !is_dim(w.k)) return kBadSize;
  if (!is_bits(w.bits) || !is_kept(w.kept)) return kBadDType;
  if (w.group_size < 1 || (w.group_size < w.k && w.group_size % kOctet != 0)) return kBadOctets;
  if (!w.tile_base || !w.values || !w.scales) return kNoArray;
  if (!w.masks && w.kept != kKeptAll) return kNoArray;
  return kOk;
}

// Dense codes, and what is kept of them.
struct Codes {
  int64_t n, k;
  const int8_t* codes;
  int32_t bits, kept;

  int64_t units() const { return ceil_div(k, kOctet); }
  // An octet's 8 codes, zeros outside of the weight, and its mask.
  uint8_t octet(int64_t row, int64_t unit, int8_t* out) const {
    unsigned mask = 0;
    int count = 0;
    for (int c = 0; c < kOctet; ++c) {
      const int64_t column = unit * kOctet + c;
      out[c] = row < n && column < k ? codes[row * k + column] : int8_t{0};
      if (out[c] != 0) {
        mask |= 1u << c;
        ++count;
      }
    }
    // Zeros make up for what a fixed count lacks.
    for (int c = 0; c < kOctet && count < kept; ++c) {
      if ((mask >> c & 1u) == 0) {
        mask |= 1u << c;
        ++count;
      }
    }
    return static_cast<uint8_t>(mask);
  }
};

// A step as it is packed.
struct Step {
  uint8_t masks[4];
  int8_t kept[2][16];
  int64_t count[2] = {0, 0};

  Step(const Codes& from, int64_t tile, int64_t unit, int64_t half) {
    for (int64_t r = 0; r < 4; ++r) {
      int8_t codes[kOctet];
      masks[r] = from.octet(tile * kOctet + half * 4 + r, unit, codes);
      for (int c = 0; c < kOctet; ++c) {
        if (masks[r] >> c & 1) kept[r / 2][count[r / 2]++] = codes[c];
      }
    }
  }
  int64_t bytes(int32_t bits) const { return step_bytes(bits, count[0], count[1]); }
  bool has_each(int32_t wanted) const {
    for (const uint8_t mask : masks) {
      if (wanted != kKeptAny && __builtin_popcount(mask) != wanted) return false;
    }
    return true;
  }
  bool fits(int32_t bits) const {
    for (int half = 0; half < 2; ++half) {
      for (int64_t i = 0; i < count[half]; ++i) {
        if (bits == kCodes4 && (kept[half][i] < -8 || kept[half][i] > 7)) return false;
      }
    }
    return true;
  }
  void write(int32_t bits, uint8_t* out) const {
    std::memset(out, 0, static_cast<size_t>(bytes(bits)));
    for (int half = 0; half < 2; ++half) {
      for (int64_t i = 0; i < count[half]; ++i) {
        const auto code = static_cast<uint8_t>(kept[half][i]);
        if (bits == kCodes8) {
          out[half * count[0] + i] = code;
        } else {
          out[i] = static_cast<uint8_t>(out[i] | (code & 15) << 4 * half);
        }
      }
    }
  }
};

template <class F>
void each_step(int64_t units, F body) {
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t half = 0; half < 2; ++half) body(unit, half);
  }
}

int32_t check_codes(const Codes& from) {
  if (!is_dim(from.n) || !is_dim(from.k)) return kBadSize;
  if (!is_bits(from.bits) || !is_kept(from.kept)) return kBadDType;
  return from.codes ? kOk : kNoArray;
}

// Below this many multiplications waking the pool costs more than it saves.
constexpr int64_t kSerialWork = 1 << 17;
constexpr int64_t kSerialRounding = 1 << 18;  // items of x
constexpr int64_t kGrain = 4;                 // tiles

}  // namespace
}  // namespace tiles

using namespace tiles;

// tile_base[tiles + 1] for codes[n][k]: where each tile's values will begin. Codes must fit `bits`, and
// no octet may have more than a fixed `kept`.
TILE_EXPORT int32_t integer_measure(int64_t n, int64_t k, const int8_t* codes, int32_t bits,
                                    int32_t kept, uint64_t* tile_base, ParallelFor pool) {
  const Codes from = {n, k, codes, bits, kept};
  int32_t code = check_codes(from);
  if (code != kOk) return code;
  if (!tile_base) return kNoArray;
  const int64_t tiles = ceil_div(n, kOctet);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      uint64_t bytes = 0;
      bool sound = true;
      each_step(from.units(), [&](int64_t unit, int64_t half) {
        const Step step(from, tile, unit, half);
        sound = sound && step.has_each(kept) && step.fits(bits);
        bytes += static_cast<uint64_t>(step.bytes(bits));
      });
      tile_base[tile + 1] = sound ? bytes : UINT64_MAX;
    }
  };
  code = run(pool, tiles, kGrain, body);
  if (code != kOk) return code;
  tile_base[0] = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (tile_base[tile + 1] == UINT64_MAX) return kCountMismatch;
    tile_base[tile + 1] += tile_base[tile];
  }
  return kOk;
}

// masks[tiles][units][8] and values, `value_bytes` with padding, for codes that integer_measure has
// measured.
TILE_EXPORT int32_t integer_pack(int64_t n, int64_t k, const int8_t* codes, int32_t bits,
                                 int32_t kept, const uint64_t* tile_base, uint8_t* masks,
                                 uint8_t* values, int64_t value_bytes, ParallelFor pool) {
  const Codes from = {n, k, codes, bits, kept};
  const int32_t code = check_codes(from);
  if (code != kOk) return code;
  if (!tile_base || !values || (!masks && kept != kKeptAll)) return kNoArray;
  const int64_t tiles = ceil_div(n, kOctet), units = from.units();
  const uint64_t used = tile_base[tiles];
  if (value_bytes < kValuePadding || used > static_cast<uint64_t>(value_bytes - kValuePadding)) {
    return kBufferTooSmall;
  }
  if (tile_base[0] != 0) return kBadOffsets;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (tile_base[tile + 1] < tile_base[tile]) return kBadOffsets;
  }
  std::memset(values + used, 0, static_cast<size_t>(value_bytes) - used);
  std::atomic<bool> sound{true};
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      uint8_t *to = values + tile_base[tile], *const last = values + tile_base[tile + 1];
      each_step(units, [&](int64_t unit, int64_t half) {
        const Step step(from, tile, unit, half);
        if (step.bytes(bits) > last - to) {
          sound = false;
          return;
        }
        if (kept != kKeptAll) {
          std::memcpy(masks + (tile * units + unit) * kOctet + half * 4, step.masks, 4);
        }
        step.write(bits, to);
        to += step.bytes(bits);
      });
    }
  };
  const int32_t packed = run(pool, tiles, kGrain, body);
  return packed == kOk && !sound ? kBadOffsets : packed;
}

// codes[n][k]. The weight must have passed integer_check.
TILE_EXPORT int32_t integer_unpack(const IntegerWeight* weight, int8_t* codes, ParallelFor pool) {
  const IntegerWeight& w = *weight;
  const int32_t code = check_shape(w);
  if (code != kOk) return code;
  if (!codes) return kNoArray;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const uint8_t* values = w.tile_values(tile);
      each_step(w.units(), [&](int64_t unit, int64_t half) {
        const uint8_t* masks =
            w.kept == kKeptAll ? values : w.tile_masks(tile) + unit * kOctet + half * 4;
        int8_t step[kStepCodes];
        values = decode_step(w, values, masks, step);
        const int64_t columns = min64(kOctet, w.k - unit * kOctet);
        for (int64_t r = 0; r < min64(4, w.n - tile * kOctet - half * 4); ++r) {
          const int64_t row = tile * kOctet + half * 4 + r;
          std::memcpy(codes + row * w.k + unit * kOctet, step + r * kOctet,
                      static_cast<size_t>(columns));
        }
      });
    }
  };
  return run(pool, w.tiles(), kGrain, body);
}

// Do masks, offsets and the values' size agree? The kernels trust them, so this comes first.
TILE_EXPORT int32_t integer_check(const IntegerWeight* weight) {
  const IntegerWeight& w = *weight;
  const int32_t code = check_shape(w);
  if (code != kOk) return code;
  uint64_t bytes = 0;
  for (int64_t tile = 0; tile < w.tiles(); ++tile) {
    if (w.tile_base[tile] != bytes) return kBadOffsets;
    if (w.kept == kKeptAll) {
      bytes += static_cast<uint64_t>(w.units() * 2 * step_bytes(w.bits, 16, 16));
      continue;
    }
    const uint8_t* masks = w.tile_masks(tile);
    for (int64_t i = 0; i < w.units() * 2; ++i, masks += 4) {
      int64_t count[4];
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t row = tile * kOctet + i % 2 * 4 + r, column = i / 2 * kOctet;
        count[r] = __builtin_popcount(masks[r]);
        if (w.kept != kKeptAny) {
          if (count[r] != w.kept) return kCountMismatch;
        } else if (masks[r] != 0 && (row >= w.n || (w.k - column < kOctet &&
                                                    masks[r] >> (w.k - column) != 0))) {
          return kPaddingBits;
        }
      }
      bytes += static_cast<uint64_t>(step_bytes(w.bits, count[0] + count[1], count[2] + count[3]));
    }
  }
  if (w.tile_base[w.tiles()] != bytes) return kBadOffsets;
  if (w.value_bytes < kValuePadding ||
      bytes > static_cast<uint64_t>(w.value_bytes - kValuePadding)) {
    return kBufferTooSmall;
  }
  return kOk;
}

// y = x W^T + bias with x rounded to int8. The weight must have passed integer_check.
TILE_EXPORT int32_t integer_linear(const IntegerWeight* weight, int32_t path, const void* x,
                                   int32_t x_dtype, int64_t m, int64_t x_stride, const void* bias,
                                   int32_t bias_dtype, void* y, int32_t y_dtype, int64_t y_stride,
                                   ParallelFor pool) {
  const IntegerWeight& w = *weight;
  const int32_t code = check_shape(w);
  if (code != kOk) return code;
  const Arrays arrays = {x, x_dtype, x_stride, bias, bias_dtype, y, y_dtype, y_stride};
  const int32_t given = arrays.check(m, w.n, w.k);
  if (given != kOk || m == 0) return given;
  const Path* found = integer_path(path);
  if (!found) return kBadPath;
  const IntegerPath* way = found->integer;
  const uint64_t failures = count_memory_failures();

  const int64_t spans = w.spans() * m, block_bytes = w.span_blocks() * static_cast<int64_t>(sizeof(RoundedBlock));
  auto* q = scratch_of<int8_t>(kScratchX, spans * (w.span_columns() + block_bytes));
  const float* padded = bias ? padded_bias(bias, bias_dtype, w.n, w.tiles() * kOctet) : nullptr;
  if (!q || (bias && !padded)) return kNoMemory;
  auto* blocks = reinterpret_cast<RoundedBlock*>(q + spans * w.span_columns());
  const IntegerProduct p = {&w, x, x_stride, x_dtype, y_dtype, y, y_stride, padded, m, q, blocks};
  auto round = [&](int64_t begin, int64_t end) { way->round_x(p, begin, end); };
  const int32_t rounded = run(m * w.k < kSerialRounding ? nullptr : pool, m, 1, round);
  if (rounded != kOk) return rounded;
  auto multiply = [&](int64_t begin, int64_t end) { way->multiply(p, begin, end); };
  const int32_t multiplied =
      run(w.n * w.k < kSerialWork / m ? nullptr : pool, w.tiles(), kGrain, multiply);
  if (multiplied != kOk) return multiplied;
  return count_memory_failures() == failures ? kOk : kNoMemory;
}

// The same for one token, see tile_row.
TILE_EXPORT int32_t integer_row(const Row* row, const void* x, void* y) {
  const auto& w = *static_cast<const IntegerWeight*>(row->weight);
  return integer_linear(&w, kAnyPath, x, row->dtype, 1, w.k, row->bias, row->bias_dtype, y, row->dtype,
                        w.n, row->pool);
}
