// What the 128 bytes of a tensor map hold here: what cuTensorMapEncodeTiled was told.
#pragma once

#include "types.h"

namespace ptx {

struct TensorMap {
  static constexpr u64 kMagic = 0x70616D726F736E74;
  u64 magic;
  u64 address;
  u32 size[5];   // elements, innermost first
  u64 pitch[4];  // bytes, of the second dimension and on
  u16 box[5];
  u8 rank, element_bytes;
  u8 swizzle;                                        // 0: none; 1, 2, 3: within 32, 64, 128 bytes
  enum : u8 { kCopied, kF16, kBf16, kF32 } element;  // kCopied: nothing is added to it
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace ptx
