// Expansion by byte shuffle, for instruction sets without vpexpand: a mask of 8 bits selects from a
// table the shuffle that moves the next kept values to the lanes of the set bits. 0x80 gives zero,
// both for pshufb and for tbl.
#pragma once

#include <cstdint>

#include "tiles.h"

namespace tiles {

struct ByteTables {
  alignas(64) uint8_t words[256][16];    // 8 words, in the order of the bits
  alignas(64) uint8_t columns[256][16];  // 8 words, column 0's four rows first, then column 1's
  alignas(64) uint8_t bytes[256][8];     // 8 bytes, in the order of the bits
  alignas(64) uint8_t dwords[16][16];    // 4 dwords, for a mask of 4 bits
  // Of two masks, the entry of the first plus that of the second expands 16 bytes: the first one's 8
  // and its count 8 times, and zeros and the second one's 8.
  alignas(64) uint8_t first[256][16];
  alignas(64) uint8_t second[256][16];
};

constexpr ByteTables make_byte_tables() {
  ByteTables t{};
  for (int mask = 0; mask < 256; ++mask) {
    int next = 0;
    for (int bit = 0; bit < 8; ++bit) {
      const bool kept = (mask >> bit & 1) != 0;
      const int column_lane = bit / 2 + (bit % 2) * 4;
      for (int b = 0; b < 2; ++b) {
        const auto from = static_cast<uint8_t>(kept ? next * 2 + b : 0x80);
        t.words[mask][bit * 2 + b] = from;
        t.columns[mask][column_lane * 2 + b] = from;
      }
      t.bytes[mask][bit] = static_cast<uint8_t>(kept ? next : 0x80);
      if (mask < 16 && bit < 4) {
        for (int b = 0; b < 4; ++b) {
          t.dwords[mask][bit * 4 + b] = static_cast<uint8_t>(kept ? next * 4 + b : 0x80);
        }
      }
      t.first[mask][bit] = t.second[mask][8 + bit] = t.bytes[mask][bit];
      if (kept) ++next;
    }
    for (int bit = 0; bit < 8; ++bit) t.first[mask][8 + bit] = static_cast<uint8_t>(next);
  }
  return t;
}

// 8 int4 values as the top halves of 8 bytes, which are the values times 16: those of even places in
// `even`, those of odd ones in `odd`, 4 bytes each, to be interleaved.
struct EightNibbles {
  uint32_t even, odd;
};

inline __attribute__((always_inline)) EightNibbles eight_nibbles(Nibbles values) {
  uint64_t bits;
  __builtin_memcpy(&bits, values.byte(), 8);
  const auto eight = static_cast<uint32_t>(bits >> (values.odd() ? 4 : 0));
  return {eight << 4 & 0xf0f0f0f0u, eight & 0xf0f0f0f0u};
}

inline constexpr ByteTables kTables = make_byte_tables();

}  // namespace tiles
