// Conversions between fp32 and the 16-bit floats, round to nearest even, and bits of a mask counted,
// in plain integers so that every path, whatever its instruction set, has a correct form for tails
// and cold code.
#pragma once

#include <cstdint>
#include <cstring>

#include "tiles.h"

namespace tiles {

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline int64_t count_bits(const uint8_t* bytes, int64_t count) {
  int64_t bits = 0, i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    bits += __builtin_popcountll(word);
  }
  for (; i < count; ++i) bits += __builtin_popcount(bytes[i]);
  return bits;
}

inline float from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

inline uint16_t to_bf16(float f) {
  const uint32_t u = bits_of(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);  // NaN
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float from_fp16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Exponent and mantissa moved in place are the number times 2^-112, subnormals included.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline uint16_t to_fp16(float f) {
  const uint32_t u = bits_of(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 puts the last kept bit at fp32's unit, and the FPU rounds to even.
    const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return static_cast<uint16_t>(sign | rounded);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

inline int8_t nibble_at(const void* p, int64_t i) {
  const uint8_t byte = static_cast<const uint8_t*>(p)[i / 2];
  // To the top and back, for the sign.
  const auto top = static_cast<int8_t>(i % 2 != 0 ? byte & 0xf0 : byte << 4);
  return static_cast<int8_t>(top / 16);
}

inline float load_as_float(const void* p, int64_t i, int32_t dtype) {
  switch (dtype) {
    case kF32: return static_cast<const float*>(p)[i];
    case kBF16: return from_bf16(static_cast<const uint16_t*>(p)[i]);
    case kF16: return from_fp16(static_cast<const uint16_t*>(p)[i]);
    case kI4: return nibble_at(p, i);
    default: return static_cast<const int8_t*>(p)[i];
  }
}

inline void store_from_float(void* p, int64_t i, int32_t dtype, float f) {
  switch (dtype) {
    case kF32: static_cast<float*>(p)[i] = f; break;
    case kBF16: static_cast<uint16_t*>(p)[i] = to_bf16(f); break;
    default: static_cast<uint16_t*>(p)[i] = to_fp16(f); break;
  }
}

}  // namespace tiles
