// whole_weight.h for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <initializer_list>
#include <vector>

#include "convert.h"
#include "target.h"
#include "tiles.h"
#include "whole_weight.h"

#define WHOLE_AVX2

namespace tiles {
namespace {

// The places of a byte's set bits, in order.
struct Kept {
  alignas(64) uint8_t places[256][8];
};

constexpr Kept make_kept() {
  Kept kept{};
  for (int byte = 0; byte < 256; ++byte) {
    int next = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if (byte >> bit & 1) kept.places[byte][next++] = static_cast<uint8_t>(bit);
    }
  }
  return kept;
}

constexpr Kept kKept = make_kept();

}  // namespace
}  // namespace tiles

TILE_TARGET_BEGIN("avx2,popcnt")
namespace tiles {
namespace {

#include "whole_weight_loops.h"

}  // namespace

const WholeLoops kAvx2Loops = kLoops;

}  // namespace tiles
TILE_TARGET_END
#endif
