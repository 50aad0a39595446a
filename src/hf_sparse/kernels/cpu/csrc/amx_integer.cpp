// AMX for products of several tokens with the integer layout.
//
// A tile register pair multiplies 16 tokens x 32 columns by 32 columns x 16 outputs of int8 and adds to
// 16 x 16 int32: a block of x, whose sums are exact. They leave the registers to be scaled, which takes
// longer than the product; even so it is several times as fast as vectors. The weight operand wants
// rows of 4 columns for 16 outputs: halves of the octets of two layout tiles, so a decoded unit of these
// is two of its rows.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "amx_registers.h"
#include "byte_tables.h"
#include "convert.h"
#include "integer.h"
#include "target.h"
#include "tiles.h"

TILE_TARGET_BEGIN(
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,f16c,popcnt,"
    "amx-tile,amx-int8")
namespace tiles {
namespace {

#include "vector_path.h"

#include "integer_dots.h"
#include "integer_vnni.h"
#include "integer_expand.h"
#include "integer_walk.h"

// Steps with the sign of their codes.
struct SignedSteps : ExpandProducts {
  template <int32_t B>
  static constexpr int32_t offset = B == kCodes4 ? 8 : 0;

  template <int32_t B, int32_t K>
  static TILE_INLINE I next(const uint8_t*& values, const uint8_t* masks, int64_t kept) {
    const I codes = step<SignedSteps, B, K>(values, masks, kept);
    return _mm256_sub_epi8(codes, _mm256_set1_epi8(static_cast<char>(offset<B>)));
  }
};

constexpr int64_t kLeastTokens = 5;  // with fewer, vectors are as fast
constexpr int64_t kPairs = 2;        // of layout tiles, that take x from L1 in turn
constexpr int64_t kOutputs = 2 * kOctet;
constexpr int64_t kSpanBlocks = kLargestSpan / kLargestBlock;
constexpr int64_t kUnitBytes = kOutputs * kOctet;

// Where the decoder is in two layout tiles. The second is past the last one if there is an odd number.
struct Cursor {
  const uint8_t *values[2], *masks[2];
  int64_t tile, count;
};

// A unit of both tiles to out[2 halves][16 outputs][4 columns].
template <int32_t B, int32_t K>
TILE_INLINE void decode_unit(Cursor& at, int64_t kept, int8_t* out) {
  __m512i octets[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t t = 0; t < at.count; ++t) {
    __builtin_prefetch(at.values[t] + kPrefetchBytes);
    const __m256i low = SignedSteps::next<B, K>(at.values[t], at.masks[t], kept);
    const __m256i high = SignedSteps::next<B, K>(at.values[t], at.masks[t] + 4, kept);
    octets[t] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    if (K != kKeptAll) at.masks[t] += kOctet;
  }
  const __m512i even =
      _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  _mm512_store_si512(out, _mm512_permutex2var_epi32(octets[0], even, octets[1]));
  _mm512_store_si512(out + 64, _mm512_permutex2var_epi32(octets[0], odd, octets[1]));
}

// sums[block][token][16] of a span: tile registers 0-3 are blocks' sums, 4 is x, 5 the weights.
TILE_INLINE void multiply_span(const int8_t* q, int64_t q_stride, const int8_t* decoded,
                               int64_t block_columns, int64_t blocks, int32_t* sums) {
  const int64_t block_bytes = block_columns * kOutputs;
#define MULTIPLY_BLOCK(b)                              \
  _tile_zero(b);                                       \
  _tile_loadd(4, q + (b) * block_columns, q_stride);   \
  _tile_loadd(5, decoded + (b) * block_bytes, 64);     \
  _tile_dpbssd(b, 4, 5);                               \
  _tile_stored(b, sums + (b) * kOutputs * kOutputs, 64);
  MULTIPLY_BLOCK(0)
  if (blocks == 1) return;
  MULTIPLY_BLOCK(1)
  if (blocks == 2) return;
  MULTIPLY_BLOCK(2)
  MULTIPLY_BLOCK(3)
#undef MULTIPLY_BLOCK
}

TILE_INLINE __m512 span_scale(const IntegerWeight& w, const Cursor& at, int64_t span) {
  const __m256 low = Bytes256::floats(w.span_scales(at.tile, span));
  const __m256 high =
      at.count == 2 ? Bytes256::floats(w.span_scales(at.tile + 1, span)) : _mm256_setzero_ps();
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

// total[count tokens][16] += a span's sums, scaled; a token has `Blocks` blocks in it.
template <int64_t Blocks>
void add_sums(const int32_t* sums, const RoundedBlock* block, int64_t count, __m512 scale,
                          float* total) {
  for (int64_t m = 0; m < count; ++m, block += Blocks, sums += kOutputs, total += kOutputs) {
    __m512 sum = _mm512_setzero_ps();
    TILE_UNROLL for (int64_t b = 0; b < Blocks; ++b) {
      const __m512i exact = _mm512_load_si512(sums + b * kOutputs * kOutputs);
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(block[b].step), sum);
    }
    _mm512_store_ps(total, _mm512_fmadd_ps(sum, scale, _mm512_load_ps(total)));
  }
}

template <int32_t B, int32_t K>
void multiply_as(const IntegerProduct& p, int64_t tile_begin, int64_t tile_end) {
  using Walk = IntegerWalk<SignedSteps>;
  const IntegerWeight& w = *p.weight;
  const int64_t span_bytes = w.span_units() * kUnitBytes, blocks = w.span_blocks();
  const int64_t rows = min64(p.m, kOutputs);  // of a tile register with x
  int8_t* decoded = scratch_of<int8_t>(kScratchTile, kPairs * span_bytes);
  float* totals = scratch_of<float>(kScratchSum, kPairs * p.m * kOutputs);
  if (!decoded || !totals) return report_no_memory();
  alignas(64) int32_t sums[kSpanBlocks * kOutputs * kOutputs];
  const auto add = blocks == 1 ? add_sums<1> : blocks == 2 ? add_sums<2> : add_sums<kSpanBlocks>;

  TileConfig config;
  for (int i = 0; i < 6; ++i) {
    config.bytes[i] = static_cast<uint16_t>(i == 4 ? w.block_columns() : 64);
    config.rows[i] = static_cast<uint8_t>(i == 5 ? w.block_columns() / 4 : rows);
  }
  _tile_loadconfig(&config);
  for (int64_t first = tile_begin; first < tile_end; first += 2 * kPairs) {
    const int64_t pairs = min64(kPairs, ceil_div(tile_end - first, 2));
    Cursor cursors[kPairs] = {};
    for (int64_t i = 0; i < pairs; ++i) {
      Cursor& at = cursors[i];
      at.tile = first + 2 * i;
      at.count = min64(2, tile_end - at.tile);
      for (int64_t t = 0; t < at.count; ++t) {
        at.values[t] = w.tile_values(at.tile + t);
        at.masks[t] = K == kKeptAll ? at.values[t] : w.tile_masks(at.tile + t);
      }
    }
    std::memset(totals, 0, static_cast<size_t>(pairs * p.m * kOutputs) * sizeof(float));
    for (int64_t span = 0; span < w.spans(); ++span) {
      const int64_t units = min64(w.span_units(), w.units() - span * w.span_units());
      __m512 scales[kPairs];
      for (int64_t i = 0; i < pairs; ++i) {
        int8_t* to = decoded + i * span_bytes;
        for (int64_t u = 0; u < units; ++u) decode_unit<B, K>(cursors[i], w.kept, to + u * kUnitBytes);
        // x is 0 beyond the last column, whatever it meets: but it has to meet something.
        std::memset(to + units * kUnitBytes, 0, static_cast<size_t>(span_bytes - units * kUnitBytes));
        scales[i] = span_scale(w, cursors[i], span);
      }
      for (int64_t token = 0; token < p.m; token += rows) {
        // The last tile register begins earlier, so that it is full, and some of its rows are known.
        const int64_t begin = min64(token, p.m - rows);
        for (int64_t i = 0; i < pairs; ++i) {
          multiply_span(p.span_q(span, begin), w.span_columns(), decoded + i * span_bytes,
                        w.block_columns(), blocks, sums);
          add(sums + (token - begin) * kOutputs, p.span_blocks(span, token), begin + rows - token,
              scales[i], totals + (i * p.m + token) * kOutputs);
        }
      }
    }
    for (int64_t i = 0; i < pairs; ++i) {
      for (int64_t m = 0; m < p.m; ++m) {
        for (int64_t t = 0; t < cursors[i].count; ++t) {
          const float* from = totals + (i * p.m + m) * kOutputs + t * kOctet;
          Walk::store_rows(p, cursors[i].tile + t, m, SignedSteps::load(from));
        }
      }
    }
  }
  _tile_release();
}

template <int32_t B>
void multiply_bits(const IntegerProduct& p, int64_t tile_begin, int64_t tile_end) {
  switch (p.weight->kept) {
    case kKeptAny: return multiply_as<B, kKeptAny>(p, tile_begin, tile_end);
    case kKeptAll: return multiply_as<B, kKeptAll>(p, tile_begin, tile_end);
    default: return multiply_as<B, kKeptFixed>(p, tile_begin, tile_end);
  }
}

void multiply(const IntegerProduct& p, int64_t tile_begin, int64_t tile_end) {
  if (p.m < kLeastTokens) return kAvx512Vbmi2Path.integer->multiply(p, tile_begin, tile_end);
  p.weight->bits == kCodes8 ? multiply_bits<kCodes8>(p, tile_begin, tile_end)
                            : multiply_bits<kCodes4>(p, tile_begin, tile_end);
}

void round_x(const IntegerProduct& p, int64_t token_begin, int64_t token_end) {
  kAvx512Vbmi2Path.integer->round_x(p, token_begin, token_end);
}

}  // namespace

const IntegerPath kAmxIntegers = {round_x, multiply};

}  // namespace tiles
TILE_TARGET_END
#endif
