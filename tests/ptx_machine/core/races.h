// The happens-before race detector: for every 16 bytes of memory, the accesses that count still.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "clocks.h"

namespace ptx {

enum class Strength : u8 { kWeak, kStrong, kAtomic };

struct Access {
  u32 agent;
  u32 time;
  u32 pc;
  bool write;
  bool async = false;  // by the async proxy
  Strength strength = Strength::kWeak;
  bool rewrites = false;      // a write of the value that is there already
  Scope scope = Scope::kGpu;  // within which it is strong
};

struct Record {
  u32 time;
  u32 pc;
  u16 agent;
  u16 bytes;  // one bit each
  bool write;
  Strength strength;
  Scope scope;
};

using Cell = std::vector<Record>;
constexpr u64 kCell = 16;

class Races {
 public:
  Races(u32 warp_agents, u32 warps_per_cta, u32 cluster)
      : warp_agents_(warp_agents), warps_per_cta_(warps_per_cta), cluster_(cluster) {}

  // Checks an access to `count` bytes at `at` of the memory that `cells` shadow, by one who knows
  // `known`, and remembers it.
  void touch(std::vector<Cell>& cells, u64 at, u64 count, Space space, const Access& access,
             const Knowledge& known);

  bool is_barrier(u32 agent) const { return agent >= warp_agents_; }
  // An access in words.
  std::string describe(u32 agent, bool write, u32 pc) const;
  bool enabled = true;
  std::vector<int> lines;       // of each instruction
  std::set<std::string> found;  // what went wrong, in words

 private:
  void touch(Cell& cell, u16 bytes, Space space, const Access& access, const Knowledge& known);
  // What is wrong with the pair, or null.
  const char* clash(const Record& record, const Access& access, Space space,
                    const Knowledge& known) const;
  u32 warp(u32 agent) const { return agent / kKinds; }
  u32 cta(u32 agent) const { return warp(agent) / warps_per_cta_; }
  bool morally_strong(const Record& record, const Access& access) const {
    return record.strength != Strength::kWeak && access.strength != Strength::kWeak &&
           scope_of(cta(record.agent), cta(access.agent), cluster_) <=
               std::min(record.scope, access.scope);
  }
  bool is_generic(u32 agent) const { return !is_barrier(agent) && agent % kKinds <= kInit; }
  bool is_async(u32 agent) const { return is_barrier(agent) || agent % kKinds >= kProduct; }

  u32 warp_agents_, warps_per_cta_, cluster_;
};

}  // namespace ptx
