// The item order of the one-launch kernels, as integer functions: lora_linear/schedule.py in C++.
//
// A CTA takes the next ticket whenever it is free, so tickets start in order; every wait is for
// items with smaller tickets, taken by a CTA that is running. So nothing can wait for ever, however
// few CTAs are resident.
#pragma once

#include "ptx.h"

namespace lora {

// The workspace, 32-bit words: all zero between launches, and the last CTA to finish leaves it so.
enum Workspace { kTicket, kFinished, kAllReady, kReady };

struct Tile {
  int row, column;
};

LORA_HOST_DEVICE int blocks(int size, int block) { return size / block + (size % block != 0); }

// Returns the row block and column block of a main or dx tile. `group` row blocks at a time are
// walked column by column, so that the tiles in flight share rows and columns in the L2 cache.
LORA_HOST_DEVICE Tile grouped_tile(int item, int row_blocks, int column_blocks, int group) {
  const int band = item / (group * column_blocks);
  const int left = row_blocks - band * group;
  const int height = group < left ? group : left;
  const int inside = item - band * group * column_blocks;
  return {band * group + inside % height, inside / height};
}

}  // namespace lora
