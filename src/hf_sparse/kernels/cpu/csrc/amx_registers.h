// The shapes of AMX's tile registers, as tileloadconfig takes them.
#pragma once

#include <cstdint>

namespace tiles {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace tiles
