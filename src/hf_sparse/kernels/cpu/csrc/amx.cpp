// AMX (Sapphire Rapids and later), for products of several tokens with bf16, int8 or int4
// values.
//
// A tile register pair multiplies 16 tokens x 32 columns by 32 columns x 16 outputs of bf16 and adds
// to 16 x 16 fp32. The weight operand wants rows of (column 2p, column 2p+1) pairs for 16 outputs:
// that is an expanded pair of tile as it stands, so decoding is one vpexpandw and one store.
//
// bf16 has 8 significant bits, and the products of two such numbers are exact in fp32:
//   int8 and int4 values fit one bf16; their scales are applied to the sums.
//   fp16 x is the exact sum of two bf16, fp32 x of three (8 + 8 + 8 bits, cut, not rounded), each
//   multiplied in turn into the same sum. The result is as good as fp32 arithmetic, except that AMX
//   takes subnormals as zero.
// Infinities and NaNs in x go into the first part alone; inf - inf in the others would make a NaN. An
// infinite weight would meet the zeros of the others, and subnormal ones would be lost: weights that
// have such values are left to the next path.
//
// Loops: tokens in super-chunks whose block of x stays in L2; outputs in turns of tiles whose sums
// do; columns in blocks whose two decoded tiles stay in L1; inside, 2 x 2 tile registers. The sums
// of up to 32 tokens stay in the registers throughout.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "amx_registers.h"
#include "convert.h"
#include "integer.h"
#include "tiles.h"
#include "target.h"

TILE_TARGET_BEGIN(
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt,"
    "amx-tile,amx-bf16")
namespace tiles {
namespace {

#include "vector_path.h"

#include "avx512_common.h"

#include "int4_vbmi.h"

constexpr int64_t kStepColumns = 32;  // columns of one multiplication
constexpr int64_t kStepPairs = kStepColumns / 2;
constexpr int64_t kStepItems = kRows * kStepColumns;  // bf16 of a tile register, 1 KB
constexpr int64_t kBlockSteps = 8;    // 16 KB of decoded weights and as much of x: L1
constexpr int64_t kSumBytes = 1 << 19;  // of sums that stay in L2: decides the tiles of a turn
constexpr int64_t kMaxTiles = 32;

// bf16 parts that make up an x.
int64_t parts(const Product& p) { return p.x_dtype == kBF16 ? 1 : p.x_dtype == kF16 ? 2 : 3; }
int64_t steps(const Weight& w) { return ceil_div(w.k, kStepColumns); }
int64_t token_groups(const Product& p) { return ceil_div(p.m, p.chunk); }
bool grouped(const Weight& w) { return has_scales(w.value_dtype) && w.group_size < w.k; }
int64_t block_steps(const Weight& w) {
  return grouped(w) ? w.group_size / kStepColumns : kBlockSteps;
}

// The parts of x: [block][group][step of the block][part][chunk tokens][32]. A block of all groups
// is contiguous: with the groups a whole row apart, powers of two would put them in the same few
// sets of L2, which costs more than half of the speed.
uint16_t* packed_step(const Product& p, int64_t group, int64_t step) {
  const int64_t block = block_steps(*p.weight);
  const int64_t place = (step / block * token_groups(p) + group) * block + step % block;
  return static_cast<uint16_t*>(p.packed_x) + place * parts(p) * p.chunk * kStepColumns;
}

bool available() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__builtin_cpu_supports("avx512vbmi2") || !__builtin_cpu_supports("avx512bw")) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = (d >> 22 & 1u) != 0, tile = (d >> 24 & 1u) != 0, int8 = (d >> 25 & 1u) != 0;
  if (!bf16 || !tile || !int8) return false;
  // The kernel gives tile registers only to processes that ask (ARCH_REQ_XCOMP_PERM, TILEDATA).
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

// One token leaves the tile unit idle, and codes have their conversion and their groups' sums to pay
// for.
bool fits(const Product& p) {
  const Weight& w = *p.weight;
  if (has_scales(w.value_dtype)) {
    return p.m >= 6 && (!grouped(w) || w.group_size % kStepColumns == 0);
  }
  return p.m >= 2 && w.value_dtype == kBF16 && w.normal != 0;
}

int64_t plan(Product& p) {
  p.chunk = ceil_div(p.m, ceil_div(p.m, kRows));
  const int64_t padded_steps = round_up(steps(*p.weight), block_steps(*p.weight));
  return token_groups(p) * p.chunk * padded_steps * kStepColumns * parts(p) * 2;
}

int64_t pack_units(const Product& p) { return token_groups(p); }

// Splits 32 columns of one token into its parts, `plane` items apart.
void split_columns(const float* x, int64_t count, int64_t plane, uint16_t* out) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int half = 0; half < 2; ++half) {
    __m512 rest = _mm512_loadu_ps(x + half * 16);
    const __m512i u = _mm512_castps_si512(rest);
    const __mmask16 finite = _mm512_cmp_epi32_mask(
        _mm512_and_si512(u, _mm512_set1_epi32(0x7f800000)), _mm512_set1_epi32(0x7f800000),
        _MM_CMPINT_NE);
    const __mmask16 nan = _mm512_cmp_ps_mask(rest, rest, _CMP_UNORD_Q);
    __m512i part = _mm512_and_si512(u, top);
    // Cutting a NaN's low bits must not leave an infinity.
    part = _mm512_mask_or_epi32(part, nan, part, _mm512_set1_epi32(0x400000));
    for (int64_t i = 0; i < count; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * plane + half * 16),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(part, 16)));
      rest = _mm512_maskz_sub_ps(finite, rest, _mm512_castsi512_ps(part));
      part = _mm512_and_si512(_mm512_castps_si512(rest), top);
    }
  }
}

void pack_x(const Product& p, int64_t begin, int64_t end) {
  const int64_t k = p.weight->k, count = parts(p), plane = p.chunk * kStepColumns;
  for (int64_t group = begin; group < end; ++group) {
    for (int64_t r = 0; r < p.chunk; ++r) {
      const int64_t m = group * p.chunk + r;
      for (int64_t step = 0; step < steps(*p.weight); ++step) {
        uint16_t* to = packed_step(p, group, step) + r * kStepColumns;
        const int64_t at = m * p.x_stride + step * kStepColumns;
        const int64_t left = m < p.m ? min64(kStepColumns, k - step * kStepColumns) : 0;
        if (count == 1) {
          std::memcpy(to, static_cast<const uint16_t*>(p.x) + (left > 0 ? at : 0),
                      static_cast<size_t>(left) * 2);
          std::memset(to + left, 0, static_cast<size_t>(kStepColumns - left) * 2);
          continue;
        }
        float x[kStepColumns] = {};
        if (left == kStepColumns) {
          Avx512::load16(p.x, at, p.x_dtype, x);
          Avx512::load16(p.x, at + 16, p.x_dtype, x + 16);
        } else {
          for (int64_t i = 0; i < left; ++i) x[i] = load_as_float(p.x, at + i, p.x_dtype);
        }
        split_columns(x, count, plane, to);
      }
    }
  }
}

int64_t grain(const Product&) { return 2; }

// A decoder's place in a tile.
template <int32_t D>
struct Cursor {
  Values<D> values;
  const uint32_t* masks;
  int64_t pairs;  // left
};

TILE_INLINE __m512i int8_to_bf16(__m256i bytes) {
  __m512 even, odd;
  Avx512::int8_columns(bytes, even, odd);
  // Both are exact in bf16; the 2^16 that they are too large goes with the scales.
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_or_si512(low, _mm512_castps_si512(odd));
}

// Decodes a tile's next step to out[16 pairs][32]; pairs beyond the last are zeros.
template <int32_t D>
TILE_INLINE void decode_step(Cursor<D>& cursor, uint16_t* out) {
  Values<D> values = cursor.values;
  const auto pair = [&](int64_t i) TILE_INLINE_LAMBDA {
    const uint32_t mask = cursor.masks[i];
    __m512i words;
    if constexpr (D == kI8) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
      words = int8_to_bf16(_mm256_maskz_expand_epi8(mask, bytes));
    } else if constexpr (D == kI4) {
      words = int4_words(values, mask);
    } else {
      words = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
    }
    values += __builtin_popcount(mask);
    _mm512_store_si512(out + i * kStepColumns, words);
  };
  if (cursor.pairs >= kStepPairs) {
    TILE_UNROLL for (int64_t i = 0; i < kStepPairs; ++i) {
      if (i % 2 == 0) {
        __builtin_prefetch(address_of(values) + kPrefetchBytes);
      }
      pair(i);
    }
  } else {
    for (int64_t i = 0; i < kStepPairs; ++i) {
      if (i < cursor.pairs) {
        pair(i);
      } else {
        _mm512_store_si512(out + i * kStepColumns, _mm512_setzero_si512());
      }
    }
  }
  __builtin_prefetch(cursor.masks + kPrefetchBytes / 4);
  cursor.values = values;
  cursor.masks += kStepPairs;
  cursor.pairs -= kStepPairs;
}

// Tile registers: 0-3 sums of (token group, output tile), 4-5 x, 6-7 weights.
void load_sums(const float* sums, int64_t stride, bool two) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + stride, 64);
  if (two) {
    _tile_loadd(2, sums + 2 * stride, 64);
    _tile_loadd(3, sums + 3 * stride, 64);
  }
}

void store_sums(float* sums, int64_t stride, bool two) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + stride, 64);
  if (two) {
    _tile_stored(2, sums + 2 * stride, 64);
    _tile_stored(3, sums + 3 * stride, 64);
  }
}

void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// sums += x[group, next group] * decoded[two tiles], for one step.
template <bool Two>
TILE_INLINE void multiply_step(const uint16_t* x, const uint16_t* next_x, const uint16_t* decoded,
                              int64_t tile_stride, int64_t part_count, int64_t plane) {
  _tile_loadd(6, decoded, 64);
  _tile_loadd(7, decoded + tile_stride, 64);
  for (int64_t part = 0; part < part_count; ++part) {
    _tile_loadd(4, x + part * plane, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (Two) {
      _tile_loadd(5, next_x + part * plane, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// The same for `count` steps. The first token groups to come by (`Decode`) decode the weights on the
// way, one step ahead, so that the vector units work while the tile unit does.
template <int32_t D, bool Two, bool Decode>
TILE_INLINE void multiply_steps(const uint16_t* x, const uint16_t* next_x, Cursor<D>* cursors,
                               int64_t tiles, uint16_t* decoded, int64_t tile_stride,
                               int64_t count, int64_t part_count, int64_t plane) {
  const auto decode = [&](int64_t step) TILE_INLINE_LAMBDA {
    for (int64_t t = 0; t < tiles; ++t) {
      decode_step<D>(cursors[t], decoded + t * tile_stride + step * kStepItems);
    }
  };
  if (Decode) decode(0);
  for (int64_t step = 0; step < count; ++step) {
    if (Decode && step + 1 < count) decode(step + 1);
    const int64_t at = step * part_count * plane;
    multiply_step<Two>(x + at, next_x + at, decoded + step * kStepItems, tile_stride, part_count,
                       plane);
  }
}

// What a decoded code must be multiplied by.
template <int32_t D>
constexpr float kUnit = D == kI8 ? Avx512::kInt8Unit : 1.0f;

// sums[group][tile][token][16] += parts * scale, and parts are what a column group gave.
template <int32_t D>
void fold_group(const Weight& w, int64_t tile, int64_t tile_count, int64_t column_group,
                int64_t token_count, const float* from, int64_t stride, float* sums,
                int64_t groups) {
  for (int64_t t = 0; t < tile_count; ++t) {
    const __m512 scale = _mm512_mul_ps(
        _mm512_loadu_ps(w.scales + ((tile + t) * w.groups() + column_group) * kRows),
        _mm512_set1_ps(kUnit<D>));
    for (int64_t g = 0; g < groups; ++g) {
      const float* a = from + (g * 2 + t) * stride;
      float* b = sums + (g * 2 + t) * stride;
      for (int64_t m = 0; m < token_count; ++m) {
        _mm512_storeu_ps(b + m * kRows, _mm512_fmadd_ps(_mm512_loadu_ps(a + m * kRows), scale,
                                                        _mm512_loadu_ps(b + m * kRows)));
      }
    }
  }
}

// One super-chunk of token groups, [group_begin, group_end), for tiles [first, first + count).
template <int32_t D>
void multiply_block(const Product& p, int64_t group_begin, int64_t group_end, int64_t first,
                    int64_t count, uint16_t* decoded, float* sums) {
  const Weight& w = *p.weight;
  const int64_t groups = group_end - group_begin, all_steps = steps(w), part_count = parts(p);
  const int64_t plane = p.chunk * kStepColumns, stride = p.chunk * kRows;
  const bool fold = grouped(w);
  // The sums of two token groups and two tiles stay in the registers from first to last column.
  const bool single = groups <= 2 && count <= 2 && !fold;
  const int64_t block = block_steps(w), tile_stride = block * kStepItems;
  // Sums are [tile pair][group][2 tiles][token][16]; an unpaired last tile leaves half unused.
  const int64_t pair_stride = round_up(groups, 2) * 2 * stride;
  float* column_sums = sums + ceil_div(count, 2) * pair_stride;

  Cursor<D> cursors[kMaxTiles];
  for (int64_t t = 0; t < count; ++t) {
    cursors[t] = {w.tile_values<D>(first + t), w.tile_masks(first + t), w.pairs()};
  }
  if (fold) {
    std::memset(sums, 0, static_cast<size_t>(ceil_div(count, 2) * pair_stride) * sizeof(float));
  }
  if (count % 2 != 0) std::memset(decoded + tile_stride, 0, static_cast<size_t>(tile_stride) * 2);

  for (int64_t step = 0; step < all_steps; step += block) {
    const int64_t now = min64(block, all_steps - step);
    for (int64_t t = 0; t < count; t += 2) {
      const int64_t tiles = min64(2, count - t);
      float* pair_sums = sums + t / 2 * pair_stride;
      for (int64_t g = 0; g < groups; g += 2) {
        const bool two = g + 1 < groups;
        float* to = pair_sums + g * 2 * stride;
        if (step == 0 || fold) {
          zero_sums();
        } else if (!single) {
          load_sums(to, stride, two);
        }
        const uint16_t* x = packed_step(p, group_begin + g, step);
        const uint16_t* next_x = two ? packed_step(p, group_begin + g + 1, step) : x;
        const auto run = [&](auto has_two, auto decodes) {
          multiply_steps<D, decltype(has_two)::value, decltype(decodes)::value>(
              x, next_x, cursors + t, tiles, decoded, tile_stride, now, part_count, plane);
        };
        using Yes = std::true_type;
        using No = std::false_type;
        if (g == 0) {
          two ? run(Yes{}, Yes{}) : run(No{}, Yes{});
        } else {
          two ? run(Yes{}, No{}) : run(No{}, No{});
        }
        if (fold) {
          store_sums(column_sums, stride, two);
          fold_group<D>(w, first + t, tiles, step / block, p.chunk, column_sums, stride,
                     to, two ? 2 : 1);
        } else if (!single || step + now == all_steps) {
          store_sums(to, stride, two);
        }
      }
    }
  }
}

template <int32_t D>
void multiply_values(const Product& p, int64_t tile_begin, int64_t tile_end) {
  const Weight& w = *p.weight;
  const int64_t stride = p.chunk * kRows;
  // Decoding is repeated for each super-chunk, so these are as long as L2 lets x be.
  const int64_t super = 32 / parts(p) / 2 * 2;
  const int64_t groups = min64(super, token_groups(p));
  const int64_t step_tiles =
      groups <= 2 ? 2 : min64(kMaxTiles, kSumBytes / (round_up(groups, 2) * stride * 4) / 2 * 2);
  auto* decoded = scratch_of<uint16_t>(kScratchTile, 2 * block_steps(w) * kStepItems);
  float* sums = scratch_of<float>(
      kScratchSum, (step_tiles / 2 * round_up(groups, 2) * 2 + 4) * stride);
  if (!decoded || !sums) return report_no_memory();

  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(i < 6 ? p.chunk : kStepPairs);
  }
  _tile_loadconfig(&config);
  for (int64_t g0 = 0; g0 < token_groups(p); g0 += super) {
    const int64_t g1 = min64(token_groups(p), g0 + super);
    const int64_t pair_stride = round_up(g1 - g0, 2) * 2 * stride;
    for (int64_t first = tile_begin; first < tile_end; first += step_tiles) {
      const int64_t count = min64(step_tiles, tile_end - first);
      multiply_block<D>(p, g0, g1, first, count, decoded, sums);
      for (int64_t m = g0 * p.chunk; m < min64(p.m, g1 * p.chunk); ++m) {
        const int64_t g = m / p.chunk - g0;
        for (int64_t t = 0; t < count; ++t) {
          const float* from = sums + t / 2 * pair_stride + (g * 2 + t % 2) * stride +
                              m % p.chunk * kRows;
          alignas(64) float scaled[kRows];
          if (has_scales(D) && !grouped(w)) {
            const __m512 scale =
                _mm512_mul_ps(_mm512_loadu_ps(w.scales + (first + t) * kRows),
                              _mm512_set1_ps(kUnit<D>));
            _mm512_store_ps(scaled, _mm512_mul_ps(_mm512_loadu_ps(from), scale));
            from = scaled;
          }
          VectorPath<Avx512>::store_outputs(p, first + t, m, from);
        }
      }
    }
  }
  _tile_release();
}

void multiply(const Product& p, int64_t tile_begin, int64_t tile_end) {
  switch (p.weight->value_dtype) {
    case kI8: return multiply_values<kI8>(p, tile_begin, tile_end);
    case kI4: return multiply_values<kI4>(p, tile_begin, tile_end);
    default: return multiply_values<kBF16>(p, tile_begin, tile_end);
  }
}

void decode(const Weight& w, int64_t tile_begin, int64_t tile_end, void* out, int32_t dtype,
            int64_t stride, bool transposed) {
  kAvx512Vbmi2Path.decode(w, tile_begin, tile_end, out, dtype, stride, transposed);
}

void dense_row(const DenseProduct& p, int64_t begin, int64_t end) {
  kAvx512Vbmi2Path.dense_row(p, begin, end);
}

void dense_columns(const ColumnProduct& p, int64_t begin, int64_t end) {
  kAvx512Vbmi2Path.dense_columns(p, begin, end);
}

void packed_columns(const ColumnProduct& p, int64_t begin, int64_t end) {
  kAvx512Vbmi2Path.packed_columns(p, begin, end);
}

}  // namespace

const Path kAmxPath = {"amx",    available, fits,      plan,          pack_units,    pack_x, grain,
                       multiply, decode,    dense_row, dense_columns, packed_columns, &kAmxIntegers};

}  // namespace tiles
TILE_TARGET_END
#endif
