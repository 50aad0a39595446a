// AVX-VNNI (Alder Lake and later, which have no AVX-512): AVX2's path with vpdpbusd for products of
// bytes.
#include "target.h"
#ifdef TILE_HAS_AVX_VNNI
#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

#include "byte_tables.h"
#include "convert.h"
#include "integer.h"
#include "tiles.h"

TILE_TARGET_BEGIN("avx2,fma,f16c,popcnt,avxvnni")
namespace tiles {
namespace {

#include "vector_path.h"
#include "integer_dots.h"
#include "integer_vnni.h"
#include "integer_walk.h"

constexpr auto multiply = IntegerWalk<VnniProducts>::multiply;

}  // namespace
}  // namespace tiles
TILE_TARGET_END

namespace tiles {
namespace {

bool available() {
  unsigned a, b, c, d;
  return kAvx2Path.available() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1u) != 0;
}

void round_x(const IntegerProduct& p, int64_t token_begin, int64_t token_end) {
  kAvx2Path.integer->round_x(p, token_begin, token_end);
}

constexpr IntegerPath kInteger = {round_x, multiply};

}  // namespace

const Path kAvxVnniPath = with_integers(kAvx2Path, "avx-vnni", available, &kInteger);

}  // namespace tiles
#endif
