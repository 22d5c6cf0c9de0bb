// The order of the items of a launch, from the host, and the blocks they stand for, on the device.
//
// A CTA takes the next ticket whenever it is free, so tickets start in order; every wait is for
// items with smaller tickets, taken by a CTA that is running. So nothing can wait for ever, however
// few CTAs are resident.
#pragma once

#include <cstdint>

#include "ptx.h"

namespace lora {

// The workspace, 32-bit words: all zero between launches, and the last CTA to finish leaves it so.
enum Workspace { kTicket, kFinished, kAllReady, kReady };

struct Tile {
  int row, column;
};

LORA_HOST_DEVICE int blocks(int size, int block) { return size / block + (size % block != 0); }

// A divisor known to the host: the device multiplies by 2^32 * (2^shift / divisor - 1), rounded up,
// instead of dividing (Granlund and Montgomery, PLDI'94). For numbers below 2^31.
struct Divisor {
  uint32_t value = 1, multiplier = 1, shift = 0;

  constexpr explicit Divisor(uint32_t value) : value(value) {
    while (uint64_t{1} << shift < value) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - value) << 32) / value + 1);
  }

  LORA_HOST_DEVICE constexpr int quotient(int n) const {
    const uint32_t number = static_cast<uint32_t>(n);
    return ((uint64_t{number} * multiplier >> 32) + number) >> shift;
  }
};

constexpr bool divides_right() {
  for (const int value : {1, 2, 3, 5, 7, 8, 48, 129, 641, 65535, 65537, (1 << 30) + 1, INT32_MAX}) {
    for (const int factor : {0, 1, 2, 3, 1000, 1 << 15, INT32_MAX / value}) {
      if (factor > INT32_MAX / value) continue;
      const int n = value * factor;
      const Divisor divisor(value);
      if (divisor.quotient(n) != factor || (n > 0 && divisor.quotient(n - 1) != (n - 1) / value)) {
        return false;
      }
    }
  }
  return true;
}
static_assert(divides_right());

// Main or dx tiles, in bands of `band_rows` blocks of rows (the last may be lower), each walked
// column by column, so that the tiles in flight share rows and columns in the L2 cache.
struct TileGrid {
  int count, band_rows, full_bands;
  Divisor band, height, last_height;

  TileGrid(int row_blocks, int column_blocks, int band_rows)
      : count(row_blocks * column_blocks),
        band_rows(band_rows),
        full_bands(row_blocks / band_rows),
        band(band_rows * column_blocks),
        height(band_rows),
        last_height(row_blocks % band_rows == 0 ? 1 : row_blocks % band_rows) {}

  // Returns the row block and column block of a tile.
  LORA_HOST_DEVICE Tile operator()(int item) const {
    const int band_index = band.quotient(item);
    const int inside = item - band_index * static_cast<int>(band.value);
    const Divisor& rows = band_index < full_bands ? height : last_height;
    const int column = rows.quotient(inside);
    return {band_index * band_rows + inside - column * static_cast<int>(rows.value), column};
  }
};

// P, Q, db or da items: every rank tile of a block of rows, then the next block.
struct SkinnyGrid {
  int count;
  Divisor rank_tiles;

  SkinnyGrid(int row_blocks, int rank_tiles)
      : count(row_blocks * rank_tiles), rank_tiles(rank_tiles) {}

  // Returns the block of rows and the rank tile of an item.
  LORA_HOST_DEVICE Tile operator()(int item) const {
    const int block = rank_tiles.quotient(item);
    return {block, item - block * static_cast<int>(rank_tiles.value)};
  }
};

}  // namespace lora
