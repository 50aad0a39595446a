// What pruning does to a whole weight beside its products: choosing the highest scores, finding and
// packing what isn't zero. The loops are compiled twice from whole_weight_loops.h, for the baseline
// and for AVX2, with the same results to the bit.
#pragma once

#include <cstdint>

namespace tiles {

// Digits of a score's rank, from the highest: 11, 11 and 10 bits.
constexpr int64_t kDigits = 1 << 11;
constexpr int64_t kShortRow = 32;
constexpr int64_t kItemSizes = 4;  // 1, 2, 4 and 8 bytes

struct WholeLoops {
  // False for the `drop` lowest of n scores, 0 < drop <= n; of equal ones the first go.
  void (*keep_highest)(const float* scores, int64_t n, int64_t drop, uint8_t* mask);
  // The same for `rows` rows of at most kShortRow.
  void (*keep_highest_short)(const float* scores, int64_t rows, int64_t n, int64_t drop,
                             uint8_t* mask);
  // Bit i of `bits` says whether item i isn't 0; of floats, whose sign doesn't count, if `sign`.
  void (*nonzero_bits[kItemSizes])(const void* row, int64_t k, bool sign, uint8_t* bits);
  // Items whose bit is set, side by side; `out` has room for `count`, which is their number.
  void (*kept_items[kItemSizes])(const void* row, int64_t k, const uint8_t* bits, int64_t count,
                                 void* out);
  void (*zero_outside[kItemSizes])(const void* items, const uint8_t* mask, int64_t count, void* out);
  // What rounding costs `width` numbers: (scale q - value)^2, times `importance` unless it is null,
  // with q the whole number in [low, high] that is nearest to value / scale.
  void (*rounding_errors)(const float* values, int64_t width, float scale, float low, float high,
                          const float* importance, float* out);
  // Is a number at or above a limit once its sign is gone? Of 2 and 4 bytes.
  bool (*any_at_least[2])(const void* items, int64_t count, uint32_t limit);
};

extern const WholeLoops kPlainLoops;
#if defined(__x86_64__)
extern const WholeLoops kAvx2Loops;
#endif

}  // namespace tiles
