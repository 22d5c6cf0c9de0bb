// Shared memory. A CTA's own addresses carry its rank in the cluster in bits 24 and up, as on
// hardware: whoever builds a descriptor from one must mask it.
#include "machine.h"

namespace ptx {

Cta& Machine::owner(Warp& warp, u32 address, bool cluster) {
  const u32 rank = address >> kRankShift;
  if (rank == warp.cta->rank) return *warp.cta;
  if (!cluster) fail(warp, "a shared::cta address of another CTA");
  if (rank >= warp.cta->cluster->ctas.size()) fail(warp, "a shared address of no CTA");
  return *warp.cta->cluster->ctas[rank];
}

u8* Machine::shared_raw(Cta& cta, u32 address, u32 bytes, u32 pc) {
  const u32 offset = (address & kOffset) - kSharedBase;
  if (offset > launch.shared_bytes || offset + bytes > launch.shared_bytes) {
    throw Failure("shared address " + std::to_string(address & kOffset) +
                  " is out of bounds at line " + std::to_string(races.lines[pc]));
  }
  if (cta.live == 0)
    throw Failure("shared memory of a CTA that has left, line " + std::to_string(races.lines[pc]));
  return &cta.shared[offset];
}

u8* Machine::shared(Warp& warp, Cta& cta, u32 address, u32 bytes) {
  if (address % bytes != 0)
    fail(warp, "misaligned shared address " + std::to_string(address & kOffset));
  return shared_raw(cta, address, bytes, warp.pc());
}

void Machine::touch_shared(Cta& cta, u32 address, u64 bytes, const Access& access,
                           const Knowledge& known) {
  races.touch(cta.cells, (address & kOffset) - kSharedBase, bytes, kShared, access, known);
}

void Machine::visit(const Warp& warp, Cta& cta, const Access& access) {
  if (&cta == warp.cta && !races.is_barrier(access.agent)) return;
  cta.visits[access.agent] = {access.time, access.pc, access.write};
}

// A wavefront serves 32 banks of 4 bytes, each with one word: of 32, 16 or 8 lanes at a time.
void Machine::count_banks(Warp& warp, Mask lanes, const u32* addresses, u32 bytes) {
  const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < kLanes; first += together) {
    u32 words[32][8 * 4];
    int held[32] = {}, most = 0, distinct = 0;
    for (int lane = first; lane < first + together; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (u32 at = 0; at < std::max(bytes, 4u); at += 4) {
        const u32 word = (addresses[lane] + at) / 4, bank = word % 32;
        u32* const end = words[bank] + held[bank];
        if (std::find(words[bank], end, word) != end) continue;
        words[bank][held[bank]++] = word;
        ++distinct;
        most = std::max(most, held[bank]);
      }
    }
    counts[warp.pc()].wavefronts += static_cast<u64>(most);
    counts[warp.pc()].fewest_wavefronts += static_cast<u64>((distinct + 31) / 32);
  }
}

}  // namespace ptx
