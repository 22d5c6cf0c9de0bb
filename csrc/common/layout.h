// How tiles lie in shared memory: panels of 64 rows of 128 bytes, swizzled as TMA writes them.
//
// A panel lies at a multiple of 1024; the 16-byte chunk c of row i lies at chunk c ^ (i % 8) (TMA's
// 128-byte swizzle). 64 x 64 16-bit elements serve as an operand of wgmma both ways: rows along M
// or N, contiguous along K (K-major); or rows along K, contiguous along M or N (MN-major). A panel
// of fp32 is 64 x 32.
#pragma once

#include <type_traits>

#include "ptx.h"

namespace lora {

constexpr int kPanel = 64;
constexpr int kRowBytes = 128;
constexpr int kPanelBytes = kPanel * kRowBytes;
constexpr int kWgmmaK = 16;

// How many elements of type T a row of a panel holds.
template <class T>
constexpr int kRowElements = kRowBytes / (std::is_same_v<T, float> ? 4 : 2);

enum class Major { kK, kMn };

// The TMA boxes that bring `kExtent` x `kDepth` of a tensor of T, along M or N and along the
// contraction: each is one row of a panel wide, and they follow one another in shared memory. With
// the contraction along the rows a box holds all of it, else `kRowsAlong` rows of M or N.
template <class T, Major kMajor, int kExtent, int kDepth, int kRowsAlong = kPanel>
struct Boxes {
  static constexpr int kWidth = kRowElements<T>;
  static constexpr int kSideBySide = kMajor == Major::kK ? kDepth / kWidth : kExtent / kWidth;
  static constexpr int kRows = kMajor == Major::kK ? kRowsAlong : kDepth;
  static constexpr int kCount = kSideBySide * (kMajor == Major::kK ? kExtent / kRows : 1);
  static constexpr int kBoxBytes = kRows * kRowBytes;
  static constexpr int kBytes = kCount * kBoxBytes;

  // Where box i lies in a tensor whose tile starts at `start` along M or N, at `depth`.
  LORA_DEVICE static int inner(int i, int start, int depth) {
    return (kMajor == Major::kK ? depth : start) + i % kSideBySide * kWidth;
  }
  LORA_DEVICE static int outer(int i, int start, int depth) {
    return kMajor == Major::kK ? start + i / kSideBySide * kRows : depth;
  }
};

// Returns the address of the 16-byte chunk `chunk` of row `row` of a panel.
LORA_DEVICE uint32_t chunk_address(uint32_t panel, int row, int chunk) {
  return panel + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Returns the wgmma descriptor of the k16 slice `slice` of consecutive panels.
//
// Bits 0-13: start / 16; 16-29: leading byte offset / 16; 32-45: stride byte offset / 16; 62-63: 1
// = 128-byte swizzle. With T = 8 elements (16 bytes) the canonical layouts are (PTX ISA, "Canonical
// Layouts" of wgmma)
//   K-major   ((8, m), (T, 2k)) : ((8T, SBO), (1, T)): SBO leads to the next 8 rows, LBO is unused;
//   MN-major  ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO)): SBO leads to the next 8 of K, LBO to
//             the next 64 of M or N, which is the next panel.
// A slice of 16 along K is 32 bytes further on in K-major, 16 rows of 128 bytes in MN-major.
// Only 18 bits of an address belong here: on sm_90 a shared address carries its CTA's rank in the
// cluster in bits 24 and up, which would land in the leading byte offset.
template <Major kMajor>
LORA_DEVICE uint64_t descriptor(uint32_t panels, int slice) {
  constexpr uint64_t kFixed = (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) |
                              (uint64_t{kMajor == Major::kMn ? kPanelBytes >> 4 : 1} << 16);
  constexpr uint32_t kSliceBytes = kMajor == Major::kMn ? kWgmmaK * kRowBytes : kWgmmaK * 2;
  return kFixed | ((panels + slice * kSliceBytes) & 0x3FFFF) >> 4;
}

}  // namespace lora
