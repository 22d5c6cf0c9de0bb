// cp.async: 4, 8 or 16 bytes a lane from global to shared memory, waited for in groups.
#include "machine.h"

namespace ptx {

void Machine::run_copy(Warp& warp, const Copy& copy) {
  u8* to = shared_raw(*warp.cta, copy.to, static_cast<u32>(copy.bytes), copy.pc);
  if (copy.given > 0) load(*warp.cta, copy.from, to, static_cast<u32>(copy.given));
  std::memset(to + copy.given, 0, static_cast<size_t>(copy.bytes - copy.given));
}

namespace {

enum Number { kToOffset, kFromOffset, kBytes };

void copy(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  const int bytes = static_cast<int>(i.number[kBytes]);
  u64 from[kLanes];
  Mask reading = 0;
  u64 given_bytes = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    const u32 to = static_cast<u32>(w.value(i.in[0], l) + static_cast<u64>(i.number[kToOffset]));
    from[l] = w.value(i.in[1], l) + static_cast<u64>(i.number[kFromOffset]);
    const int given = i.in.size() > 2 ? static_cast<int>(w.value(i.in[2], l)) : bytes;
    if (given < 0 || given > bytes) m.fail(w, "cp.async of more bytes than its size");
    if (from[l] % static_cast<u64>(bytes) != 0) m.fail(w, "misaligned global address");
    if (given > 0) {
      m.touch_global(w, from[l], static_cast<u64>(given), {w.agent(kRead), w.time, w.pc(), false});
      reading |= 1u << l;
      given_bytes += static_cast<u64>(given);
    }
    Cta& cta = m.owner(w, to, false);
    m.shared(w, cta, to, static_cast<u32>(bytes));
    m.touch_shared(cta, to, static_cast<u64>(bytes),
                   {w.agent(kCopy), w.copy_groups + 1, w.pc(), true}, w.known);
    w.copies.push_back({from[l], to, bytes, given, w.copy_groups, w.pc()});
  }
  m.count_global(w, reading, from, static_cast<u32>(bytes));
}

void commit(Machine& m, Warp& w, const Instruction&, Mask) {
  ++w.copy_groups;
  m.progress();
}

// All but the latest `pending` groups are done; without a number everything is, committed or not.
void wait(Machine& m, Warp& w, const Instruction& i, Mask) {
  const s64 done = i.number[0] < 0 ? s64{w.copy_groups} + 1 : s64{w.copy_groups} - i.number[0];
  for (size_t k = 0; k < w.copies.size();) {
    if (w.copies[k].group < done) {
      m.run_copy(w, w.copies[k]);
      w.copies.erase(w.copies.begin() + static_cast<long>(k));
    } else {
      ++k;
    }
  }
  if (done > 0) w.known.happened.raise(w.agent(kCopy), static_cast<u32>(done));
}

void decode(Decoder& d) {
  d.made.flow = Flow::kSwitch;
  if (d.modifiers.take("commit_group")) {
    d.made.run = commit;
  } else if (d.modifiers.take("wait_group")) {
    d.made.number = {d.immediate(0)};
    d.made.run = wait;
  } else if (d.modifiers.take("wait_all")) {
    d.made.number = {-1};
    d.made.run = wait;
  } else {
    d.modifiers.take_cache_hints();
    d.modifiers.take_one({"shared", "shared::cta"});
    d.modifiers.take_one({"global"});
    const s64 bytes = d.immediate(2);
    if (bytes != 4 && bytes != 8 && bytes != 16) throw Failure("a size that does not exist");
    const s64 to = d.address(0, 4), from = d.address(1, 8);
    d.made.number = {to, from, bytes};
    if (d.operands() > 3) d.in(3, 4);
    d.made.run = copy;
  }
}

}  // namespace

void add_cp_async(Table& table) { table.family("cp.async", decode); }

}  // namespace ptx
