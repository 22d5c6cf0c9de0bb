#include "races.h"

namespace ptx {

void Races::touch(std::vector<Cell>& cells, u64 at, u64 count, Space space, const Access& access,
                  const Knowledge& known) {
  if (!enabled) return;
  for (u64 cell = at / kCell; cell * kCell < at + count; ++cell) {
    const u64 first = std::max(at, cell * kCell) - cell * kCell;
    const u64 last = std::min(at + count, (cell + 1) * kCell) - cell * kCell;
    touch(cells[cell], static_cast<u16>((1u << last) - (1u << first)), space, access, known);
  }
}

void Races::touch(Cell& cell, u16 bytes, Space space, const Access& access,
                  const Knowledge& known) {
  size_t kept = 0;
  bool remembered = false;
  for (size_t i = 0; i < cell.size(); ++i) {
    Record record = cell[i];
    if (record.bytes & bytes) {
      const bool same = record.agent == access.agent && record.write == access.write &&
                        record.strength == access.strength && record.scope == access.scope;
      if (record.write || access.write) {
        const bool exempt = morally_strong(record, access);
        const char* wrong = clash(record, access, space, known);
        if (wrong != nullptr && found.size() < 100) {
          found.insert(std::string(wrong) + " in " + (space == kShared ? "shared" : "global") +
                       " memory: " + describe(access.agent, access.write, access.pc) + " and " +
                       describe(record.agent, record.write, record.pc));
        }
        // A write hides what came before it. What may run beside it is still to be watched, but
        // not one atomic after another: they stand in an order.
        const bool both_atomic =
            record.strength == Strength::kAtomic && access.strength == Strength::kAtomic;
        const bool beside = exempt && known.happened[record.agent] < record.time && !both_atomic;
        // Nor does a write hide what may meet fewer than it may itself.
        const bool meets_more = access.strength != Strength::kWeak &&
                                (record.strength == Strength::kWeak || record.scope < access.scope);
        if (access.write && !beside && !meets_more) record.bytes &= static_cast<u16>(~bytes);
      } else if (same) {
        if ((record.bytes & ~bytes) == 0) {
          record.bytes = 0;
        } else if (record.time == access.time && (bytes & ~record.bytes) == 0) {
          remembered = true;
        }
      }
    }
    if (record.bytes != 0) cell[kept++] = record;
  }
  cell.resize(kept);
  if (remembered) return;
  cell.push_back({access.time, access.pc, static_cast<u16>(access.agent), bytes, access.write,
                  access.strength, access.scope});
}

const char* Races::clash(const Record& record, const Access& access, Space space,
                         const Knowledge& known) const {
  const bool same_warp = !is_barrier(record.agent) && !is_barrier(access.agent) &&
                         warp(record.agent) == warp(access.agent);
  const bool in_order = same_warp && is_generic(record.agent) && is_generic(access.agent);
  if (!in_order && known.happened[record.agent] < record.time) {
    // A store may lose a count that it does not come after; other strong accesses may meet, within
    // a proxy and the scope of both.
    const bool lost_count = (record.strength == Strength::kAtomic &&
                             access.strength == Strength::kStrong && access.write) ||
                            (access.strength == Strength::kAtomic &&
                             record.strength == Strength::kStrong && record.write);
    const bool same_proxy = is_async(record.agent) == access.async;
    if (morally_strong(record, access) && same_proxy && !lost_count) return nullptr;
    if (access.rewrites && is_generic(record.agent)) return nullptr;
    return "race";
  }
  if (!access.async || !record.write) return nullptr;
  // The async proxy sees a write of the generic one, and what another CTA's has handed over by
  // ordinary synchronisation, only past a proxy fence. mbarriers hand over within the proxy.
  if (is_barrier(record.agent)) return nullptr;
  if (is_async(record.agent) && !is_barrier(access.agent) &&
      cta(record.agent) == cta(access.agent)) {
    return nullptr;
  }
  return known.fenced[space][record.agent] < record.time ? "no proxy fence" : nullptr;
}

std::string Races::describe(u32 agent, bool write, u32 pc) const {
  static const char* const kNames[] = {
      "", "", "mbarrier.init's ", "cp.async ", "product's ", "TMA store's ", "TMA store's "};
  const std::string where = " at line " + std::to_string(lines[pc]);
  if (is_barrier(agent)) return "TMA load's write" + where;
  return std::string(kNames[agent % kKinds]) + (write ? "write" : "read") + where;
}

}  // namespace ptx
