// The functions of the ABI over whole weights, and their plain loops.
#include "whole_weight.h"

#include <cstring>
#include <initializer_list>
#include <new>
#include <vector>

#include "abi.h"
#include "convert.h"

namespace tiles {
namespace {

#include "whole_weight_loops.h"

const WholeLoops& loops() {
#if defined(__x86_64__)
  if (can_run(kAvx2Path)) return kAvx2Loops;
#endif
  return kPlainLoops;
}

// Where functions for items of that many bytes stand; -1 if there are none.
int64_t place_of(int64_t item_size) {
  for (int64_t place = 0; place < kItemSizes; ++place) {
    if (item_size == int64_t{1} << place) return place;
  }
  return -1;
}

bool is_count(int64_t count) { return count >= 1 && count <= kMaxStride; }

constexpr int64_t kGrain = 1 << 16;  // items that are worth a thread

int64_t row_grain(int64_t k) { return kGrain / k + 1; }

}  // namespace

const WholeLoops kPlainLoops = kLoops;

}  // namespace tiles

using namespace tiles;

TILE_EXPORT int32_t whole_keep_highest(int64_t rows, int64_t n, const float* scores, int64_t drop,
                                       uint8_t* mask, ParallelFor pool) {
  if (!is_count(rows) || !is_count(n) || drop < 1 || drop > n) return kBadSize;
  if (!scores || !mask) return kNoArray;
  auto body = [&](int64_t begin, int64_t end) {
    if (n <= kShortRow) {
      loops().keep_highest_short(scores + begin * n, end - begin, n, drop, mask + begin * n);
      return;
    }
    try {
      for (int64_t row = begin; row < end; ++row) {
        loops().keep_highest(scores + row * n, n, drop, mask + row * n);
      }
    } catch (const std::bad_alloc&) {
      report_no_memory();
    }
  };
  const uint64_t failures = count_memory_failures();
  const int32_t code = run(pool, rows, row_grain(n), body);
  if (code != kOk) return code;
  return count_memory_failures() == failures ? kOk : kNoMemory;
}

TILE_EXPORT int32_t whole_nonzero_bits(int64_t rows, int64_t k, const void* items,
                                       int64_t item_size, int32_t sign, uint8_t* bits,
                                       ParallelFor pool) {
  const int64_t place = place_of(item_size);
  if (!is_count(rows) || !is_count(k) || place < 0) return kBadSize;
  const int64_t row_bytes = ceil_div(k, 8);
  if (!items || !bits) return kNoArray;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      loops().nonzero_bits[place](static_cast<const uint8_t*>(items) + row * k * item_size, k,
                                  sign != 0, bits + row * row_bytes);
    }
  };
  return run(pool, rows, row_grain(k), body);
}

// `count` is the number of set bits, and what `out` has room for; bits beyond k are 0.
TILE_EXPORT int32_t whole_kept_items(int64_t rows, int64_t k, const void* items, int64_t item_size,
                                     const uint8_t* bits, int64_t count, void* out,
                                     ParallelFor pool) {
  const int64_t place = place_of(item_size);
  if (!is_count(rows) || !is_count(k) || place < 0) return kBadSize;
  const int64_t row_bytes = ceil_div(k, 8);
  if (!items || !bits || (!out && count > 0)) return kNoArray;
  std::vector<int64_t> start;
  try {
    start.resize(static_cast<size_t>(rows) + 1);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* of = bits + row * row_bytes;
    if (k % 8 != 0 && of[row_bytes - 1] >> (k % 8) != 0) return kPaddingBits;
    const auto at = static_cast<size_t>(row);
    start[at + 1] = start[at] + count_bits(of, row_bytes);
  }
  if (start.back() != count) return kCountMismatch;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto at = static_cast<size_t>(row);
      loops().kept_items[place](static_cast<const uint8_t*>(items) + row * k * item_size, k,
                                bits + row * row_bytes, start[at + 1] - start[at],
                                static_cast<uint8_t*>(out) + start[at] * item_size);
    }
  };
  return run(pool, rows, row_grain(k), body);
}

// `mask` holds 0 and 1; `out` may be `items`.
TILE_EXPORT int32_t whole_zero_outside(int64_t count, const void* items, int64_t item_size,
                                       const uint8_t* mask, void* out, ParallelFor pool) {
  const int64_t place = place_of(item_size);
  if (!is_count(count) || place < 0) return kBadSize;
  if (!items || !mask || !out) return kNoArray;
  auto body = [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kGrain, last = min64(end * kGrain, count);
    loops().zero_outside[place](static_cast<const uint8_t*>(items) + first * item_size,
                                mask + first, last - first,
                                static_cast<uint8_t*>(out) + first * item_size);
  };
  return run(pool, ceil_div(count, kGrain), 1, body);
}

// 1 if no item is infinite or NaN, 0 if one is, -1 if the arguments are none.
TILE_EXPORT int32_t whole_all_finite(int64_t count, const void* items, int32_t dtype) {
  if (!is_count(count) || !is_float(dtype) || !items) return -1;
  const uint32_t limit = dtype == kF32 ? 0x7f800000u : dtype == kBF16 ? 0x7f80u : 0x7c00u;
  return loops().any_at_least[dtype == kF32 ? 1 : 0](items, count, limit) ? 0 : 1;
}

// Of each of rows x groups groups, which lie side by side; `zeros` holds zero points in
// [0, levels], or is null for codes in [-levels / 2, levels / 2]; `importance` is one row, or null.
TILE_EXPORT int32_t whole_rounding_errors(int64_t rows, int64_t groups, int64_t width,
                                          const float* values, const float* scales,
                                          const int16_t* zeros, int32_t levels,
                                          const float* importance, float* out, ParallelFor pool) {
  if (!is_count(rows) || !is_count(groups) || !is_count(width)) return kBadSize;
  if (!is_count(groups * width) || levels < 1) return kBadSize;
  if (!values || !scales || !out) return kNoArray;
  const auto top = static_cast<float>(levels), half = static_cast<float>(levels / 2);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * groups; i < end * groups; ++i) {
      const float zero = zeros ? static_cast<float>(zeros[i]) : half;
      loops().rounding_errors(values + i * width, width, scales[i], -zero,
                              zeros ? top - zero : half,
                              importance ? importance + i % groups * width : nullptr,
                              out + i * width);
    }
  };
  return run(pool, rows, row_grain(groups * width), body);
}
