// How tiles lie in shared memory: panels of 64 x 64 16-bit elements, swizzled as TMA writes them.
//
// A panel is 64 rows of 128 bytes at a multiple of 1024; the 16-byte chunk c of row i lies at chunk
// c ^ (i % 8) (TMA's 128-byte swizzle). It serves as an operand of wgmma both ways: rows along M or
// N, contiguous along K (K-major); or rows along K, contiguous along M or N (MN-major).
#pragma once

#include "ptx.h"

namespace lora {

constexpr int kPanel = 64;
constexpr int kPanelBytes = kPanel * kPanel * 2;
constexpr int kWgmmaK = 16;

enum class Major { kK, kMn };

// Returns the address of the 16-byte chunk `chunk` of row `row` of a panel.
LORA_DEVICE uint32_t chunk_address(uint32_t panel, int row, int chunk) {
  return panel + row * 128 + ((chunk ^ (row & 7)) << 4);
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
  constexpr uint32_t kSliceBytes = kMajor == Major::kMn ? kWgmmaK * 128 : kWgmmaK * 2;
  return kFixed | ((panels + slice * kSliceBytes) & 0x3FFFF) >> 4;
}

}  // namespace lora
