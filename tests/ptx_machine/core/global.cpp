// Global memory. A weak store stays with its CTA until a release that it happened before, or until
// chance lets it out: other CTAs and TMA see memory without it.
#include "machine.h"

namespace ptx {

Allocation& Machine::allocation(const Warp& warp, u64 address, u64 bytes, bool write) {
  for (Allocation& a : memory_) {
    if (address < a.base || address + bytes > a.base + a.bytes) continue;
    if (write && !a.writable) fail(warp, "a write to an input");
    return a;
  }
  std::string text = write ? "a write of " : "a read of ";
  text += std::to_string(bytes) + " bytes outside of every tensor";
  for (const Allocation& a : memory_) {
    if (address + 4096 > a.base && address < a.base + a.bytes + 4096) {
      text += ", " + std::to_string(static_cast<s64>(address - a.base)) + " bytes into one of " +
              std::to_string(a.bytes);
    }
  }
  fail(warp, text);
}

void Machine::touch_global(const Warp& warp, u64 address, u64 bytes, const Access& access) {
  Allocation& a = allocation(warp, address, bytes, access.write);
  if (a.writable) {
    races.touch(a.cells, address - a.base / kCell * kCell, bytes, kGlobal, access, warp.known);
  }
}

void Machine::load(Cta& cta, u64 address, void* to, u32 bytes) {
  std::memcpy(to, reinterpret_cast<const void*>(address), bytes);
  if (cta.pending.empty()) return;
  for (auto found = cta.pending.lower_bound(address / 16);
       found != cta.pending.end() && found->first * 16 < address + bytes; ++found) {
    for (u32 i = 0; i < 16; ++i) {
      const u64 at = found->first * 16 + i;
      if ((found->second.bytes >> i & 1) && at >= address && at < address + bytes) {
        static_cast<u8*>(to)[at - address] = found->second.data[i];
      }
    }
  }
}

void Machine::store_weak(Cta& cta, u64 address, const void* from, u32 bytes, u32 agent, u32 time) {
  for (u32 i = 0; i < bytes; ++i) {
    const u64 at = address + i;
    Pending& pending = cta.pending[at / 16];
    if (pending.bytes != 0 && (pending.agent != agent || pending.time != time)) {
      commit(cta, at / 16 * 16, 16);
    }
    Pending& fresh = cta.pending[at / 16];
    fresh.agent = agent;
    fresh.time = time;
    fresh.data[at % 16] = static_cast<const u8*>(from)[i];
    fresh.bytes |= static_cast<u16>(1u << at % 16);
  }
  progress();
}

namespace {

void write_out(u64 granule, const Pending& pending) {
  for (u32 i = 0; i < 16; ++i) {
    if (pending.bytes >> i & 1) reinterpret_cast<u8*>(granule * 16)[i] = pending.data[i];
  }
}

}  // namespace

void Machine::commit(Cta& cta, u64 address, u32 bytes) {
  auto first = bytes == 0 ? cta.pending.begin() : cta.pending.lower_bound(address / 16);
  const auto last =
      bytes == 0 ? cta.pending.end() : cta.pending.upper_bound((address + bytes - 1) / 16);
  if (first == last) return;
  for (auto i = first; i != last; ++i) write_out(i->first, i->second);
  cta.pending.erase(first, last);
  news();
}

void Machine::commit_known(Warp& warp, const Knowledge& known) {
  bool any = false;
  for (const auto& cta : warp.cta->cluster->ctas) {
    for (auto i = cta->pending.begin(); i != cta->pending.end();) {
      if (known.happened[i->second.agent] >= i->second.time) {
        write_out(i->first, i->second);
        i = cta->pending.erase(i);
        any = true;
      } else {
        ++i;
      }
    }
  }
  if (any) news();
}

void Machine::commit_some(Cta& cta) {
  if (cta.pending.empty()) return;
  for (u32 count = 1 + random(64); count > 0 && !cta.pending.empty(); --count) {
    auto chosen = cta.pending.begin();
    std::advance(chosen, random(std::min<u32>(static_cast<u32>(cta.pending.size()), 8)));
    write_out(chosen->first, chosen->second);
    cta.pending.erase(chosen);
  }
  news();
}

void Machine::count_global(Warp& warp, Mask lanes, const u64* addresses, u32 bytes) {
  u64 sectors[kLanes * 2];
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    for (u64 s = addresses[lane] / 32; s <= (addresses[lane] + bytes - 1) / 32; ++s) {
      sectors[count++] = s;
    }
  }
  std::sort(sectors, sectors + count);
  Counts& c = counts[warp.pc()];
  c.sectors += static_cast<u64>(std::unique(sectors, sectors + count) - sectors);
  c.bytes += static_cast<u64>(bytes) * static_cast<u64>(__builtin_popcount(lanes));
}

}  // namespace ptx
