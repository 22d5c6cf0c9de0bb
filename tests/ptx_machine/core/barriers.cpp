// bar.sync, barrier.cluster and mbarriers.
#include "machine.h"

namespace ptx {

// --- bar.sync: the warps of a CTA
// ------------------------------------------------------------------

void Machine::release(CtaBarrier& barrier) {
  for (Warp* warp : barrier.waiting) {
    warp->known.join(barrier.brought);
    warp->waits_for.clear();
  }
  wake(barrier.waiting);
  barrier.arrived = 0;
  barrier.brought.clear();
}

// Threads that have left count as arrived at barriers of the whole CTA.
void Machine::leave_barriers(Cta& cta) {
  const int gone = static_cast<int>(cta.warps.size()) - cta.live + 1;
  for (CtaBarrier& barrier : cta.barriers) {
    if (!barrier.waiting.empty() && barrier.whole &&
        barrier.arrived == 32 * (static_cast<int>(cta.warps.size()) - gone)) {
      release(barrier);
    }
  }
}

MBarrier& Machine::mbarrier(Warp& warp, Cta& cta, u32 address) {
  if (cta.live == 0) fail(warp, "the mbarrier of a CTA that has left");
  const auto found = cta.mbarriers.find(address & kOffset);
  if (found == cta.mbarriers.end() || !found->second.live) {
    fail(warp, "no mbarrier at shared address " + std::to_string(address & kOffset));
  }
  return found->second;
}

void Machine::complete_if_done(MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.transactions != 0) return;
  ++barrier.phase;
  ++barrier.completed;
  barrier.pending = barrier.expected;
  for (int scope = 0; scope < 2; ++scope) {
    barrier.complete[scope].join(barrier.coming[scope]);
    barrier.complete[scope].happened.raise(barrier.agent, barrier.completed);
  }
  wake(barrier.waiting);
  progress();
}

namespace {

void bar(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  const int lane = __builtin_ctz(lanes);
  const u64 id = w.value(i.in[0], lane);
  if (id > 15) m.fail(w, "no such barrier");
  Cta& cta = *w.cta;
  CtaBarrier& barrier = cta.barriers[id];
  const bool whole = i.in.size() == 1;
  const int expected = whole ? 32 * cta.live : static_cast<int>(w.value(i.in[1], lane));
  if (expected % 32 != 0) m.fail(w, "a barrier for a part of a warp");
  if (barrier.arrived > 0 && barrier.expected != expected && !(whole && barrier.whole))
    m.fail(w, "another number of threads than others expect at barrier " + std::to_string(id));
  barrier.whole = whole;
  barrier.expected = expected;
  barrier.brought.join(w.known);
  m.tick(w);
  barrier.arrived += 32;
  if (barrier.arrived > expected) m.fail(w, "too many arrivals at barrier " + std::to_string(id));
  const bool waits = i.number[0];
  if (barrier.arrived < expected) {
    if (!waits) return;
    w.state = Warp::kAtBarrier;
    w.waits_for = "barrier " + std::to_string(id) + ", where " + std::to_string(barrier.arrived) +
                  " of " + std::to_string(expected) + " threads are";
    barrier.waiting.push_back(&w);
    return;
  }
  if (waits) w.known.join(barrier.brought);
  m.release(barrier);
}

void decode_bar(Decoder& d) {
  const bool warp = d.modifiers.take("warp");
  const int kind = d.modifiers.take_one({"sync", "arrive"});
  d.modifiers.take("cta");
  d.modifiers.take("aligned");
  d.made.gathers = true;
  d.made.flow = Flow::kSwitch;
  d.in(0, 4);
  if (warp) {
    d.made.some = true;
    d.made.run = [](Machine& m, Warp& w, const Instruction&, Mask) { m.tick(w); };
    return;
  }
  if (d.operands() > 1) d.in(1, 4);
  d.made.number = {kind == 0};
  d.made.run = bar;
}

// --- barrier.cluster
// ---------------------------------------------------------------------------------

void cluster_arrive(Machine& m, Warp& w, const Instruction& i, Mask) {
  Cluster& cluster = *w.cta->cluster;
  if (w.cluster_arrived) m.fail(w, "a second arrival at the cluster's barrier");
  w.cluster_arrived = true;
  w.cluster_phase = cluster.phase;
  if (i.number[0]) {
    m.commit_known(w, w.known);
    cluster.coming.join(w.known);
  } else {  // it tells what fences have announced
    cluster.coming.join(w.announced[Scope::kCluster]);
    cluster.coming.happened.raise(w.agent(kInit), w.inits_announced);
  }
  m.tick(w);
  if (++cluster.arrived < cluster.size) return;
  m.progress();
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.complete.join(cluster.coming);
  m.wake(cluster.waiting);
}

void cluster_wait(Machine& m, Warp& w, const Instruction& i, Mask) {
  Cluster& cluster = *w.cta->cluster;
  if (!w.cluster_arrived) m.fail(w, "a wait for the cluster without an arrival");
  if (cluster.phase == w.cluster_phase) {
    w.again = true;
    m.sleep(w, cluster.waiting,
            "the cluster, of whose " + std::to_string(cluster.size) + " warps " +
                std::to_string(cluster.arrived) + " have arrived");
    return;
  }
  w.cluster_arrived = false;
  w.waits_for.clear();
  if (i.number[0]) w.known.join(cluster.complete);
}

void decode_cluster(Decoder& d) {
  const int kind = d.modifiers.take_one({"arrive", "wait"});
  const int order = d.modifiers.take_any({"release", "acquire", "relaxed"}, -1);
  d.modifiers.take("aligned");
  d.made.number = {order != 2};
  d.made.gathers = true;
  d.made.flow = Flow::kSwitch;
  d.made.run = kind == 0 ? cluster_arrive : cluster_wait;
}

// --- mbarriers
// -----------------------------------------------------------------------------------------

enum Number {
  kOffsetNumber,
  kClusterSpace,
  kClusterScope,
  kRelaxed,
  kExpects,
  kArrives,
  kByParity,
};

// What an arrival returns for those who wait by it: the phase, in a form that nothing else has.
constexpr u64 kState = u64{0xA221} << 48;

u32 address_of(const Warp& w, const Instruction& i, int lane) {
  return static_cast<u32>(w.value(i.in[0], lane) + static_cast<u64>(i.number[kOffsetNumber]));
}

// An operation on the barrier must come after its init.
void touch(Machine& m, Warp& w, Cta& cta, u32 address) {
  Access access{w.agent(kRead), w.time, w.pc(), false};
  access.strength = Strength::kAtomic;
  m.touch_shared(cta, address, 8, access, w.known);
  m.visit(w, cta, access);
}

void init(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    const u32 address = address_of(w, i, l);
    Cta& cta = m.owner(w, address, false);
    m.shared(w, cta, address, 8);
    m.touch_shared(cta, address, 8, {w.agent(kInit), w.time, w.pc(), true}, w.known);
    const auto [found, fresh] = cta.mbarriers.try_emplace(address & kOffset);
    MBarrier& barrier = found->second;
    if (fresh) barrier.agent = m.new_agent();
    if (barrier.live) m.report(w, "an mbarrier is initialised twice");
    barrier.live = true;
    barrier.expected = barrier.pending = static_cast<u32>(w.value(i.in[1], l));
    if (barrier.expected == 0) m.fail(w, "an mbarrier that expects nobody");
    barrier.transactions = 0;
    barrier.phase = 0;
    for (Knowledge* k :
         {&barrier.coming[0], &barrier.coming[1], &barrier.complete[0], &barrier.complete[1]})
      k->clear();
  }
}

void invalidate(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    const u32 address = address_of(w, i, l);
    Cta& cta = m.owner(w, address, false);
    MBarrier& barrier = m.mbarrier(w, cta, address);
    m.touch_shared(cta, address, 8, {w.agent(kWrite), w.time, w.pc(), true}, w.known);
    if (barrier.transactions != 0)
      m.report(w, "an mbarrier with bytes on their way is invalidated");
    barrier.live = false;
  }
}

void arrive(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    const u32 address = address_of(w, i, l);
    Cta& cta = m.owner(w, address, i.number[kClusterSpace]);
    MBarrier& barrier = m.mbarrier(w, cta, address);
    touch(m, w, cta, address);
    if (i.number[kExpects]) barrier.transactions += static_cast<s64>(w.value(i.in[1], l));
    if (!i.number[kArrives]) {
      m.complete_if_done(barrier);
      continue;
    }
    const u64 count = !i.number[kExpects] && i.in.size() > 1 ? w.value(i.in[1], l) : 1;
    if (barrier.pending < count) m.fail(w, "more arrivals than the mbarrier expects");
    const bool near = &cta == w.cta;
    // To another CTA, what is released to this CTA alone says that this warp's reads are over, not
    // what it wrote. That TMA's writes are over too is what everybody assumes.
    const auto reads = [&](u32 agent) {
      return m.races.is_barrier(agent) || agent % kKinds == kRead || agent % kKinds == kProduct ||
             agent % kKinds == kBulkRead;
    };
    if (!i.number[kRelaxed]) {
      if (near) {
        for (auto& coming : barrier.coming) coming.join(w.known);
      } else {
        barrier.coming[0].join_if(w.known, reads);
        if (i.number[kClusterScope]) {
          m.commit_known(w, w.known);
          barrier.coming[1].join(w.known);
        } else {
          barrier.coming[1].join_if(w.known, reads);
        }
      }
    }
    if (!i.out.empty()) w.set(i.out[0], l, kState | barrier.phase);
    barrier.pending -= static_cast<u32>(count);
    m.complete_if_done(barrier);
  }
  m.tick(w);
}

void try_wait(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  Mask done = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    const u32 address = address_of(w, i, l);
    Cta& cta = m.owner(w, address, false);
    MBarrier& barrier = m.mbarrier(w, cta, address);
    touch(m, w, cta, address);
    const u64 awaited = w.value(i.in[1], l);
    if (!i.number[kByParity] && awaited >> 32 != kState >> 32)
      m.fail(w, "a wait for what is no state of an mbarrier");
    const u32 phase = static_cast<u32>(awaited), parity = phase & 1;
    if (i.number[kByParity] ? (barrier.phase & 1) == parity : barrier.phase == phase) {
      if (w.state == Warp::kReady) {
        m.sleep(w, barrier.waiting,
                "the end of a phase of parity " + std::to_string(parity) + " of the mbarrier at " +
                    std::to_string(address & kOffset) + ", which wants " +
                    std::to_string(barrier.pending) + " arrivals and " +
                    std::to_string(barrier.transactions) + " bytes");
      }
    } else if (!m.launch.adversarial || m.random(16) != 0) {  // it may come back without cause
      if (!i.number[kRelaxed]) w.known.join(barrier.complete[i.number[kClusterScope]]);
      done |= 1u << l;
    }
  }
  if (done == lanes) {
    w.waits_for.clear();
  } else {
    --m.counts[w.pc()].executed;  // a wait counts once, however often one asks
  }
  w.write_predicate(i.out[0], done, lanes);
}

void decode_mbarrier(Decoder& d) {
  Modifiers& modifiers = d.modifiers;
  const int kind =
      modifiers.take_one({"init", "inval", "arrive", "expect_tx", "try_wait", "test_wait"});
  const bool expects = kind == 3 || modifiers.take("expect_tx");
  const int order = modifiers.take_any({"acquire", "release", "relaxed"}, -1);
  const Scope scope = take_scope(modifiers, Scope::kCta);
  const int space = modifiers.take_any({"shared::cta", "shared::cluster", "shared"}, 2);
  const bool by_parity = modifiers.take("parity");
  if (modifiers.take_type() != "b64") throw Failure("an mbarrier is a b64");
  d.made.flow = Flow::kSwitch;
  int at = 0;
  if (kind == 2) {
    if (d.operands() > 1 && !d.operand(0).address) {
      at = 1;
      if (d.operand(0).parts[0].kind != '_') {
        if (space == 1) throw Failure("an arrival at another CTA returns no state");
        d.out(0, 8);
      }
    }
  } else if (kind >= 4) {
    at = 1;
    d.out_predicate(0);
  }
  d.made.number = {d.address(at, 4), space == 1, scope != Scope::kCta, order == 2, expects,
                   kind == 2,        by_parity};
  if (d.operands() > at + 1) d.in(at + 1, kind >= 4 && !by_parity ? 8 : 4);
  if (d.operands() > at + 2 && kind < 4) throw Failure("too many operands");
  static constexpr Handler kRuns[] = {init, invalidate, arrive, arrive, try_wait, try_wait};
  d.made.run = kRuns[kind];
}

}  // namespace

void add_barriers(Table& table) {
  table.family("bar", decode_bar);
  table.family("barrier", decode_bar);
  table.family("barrier.cluster", decode_cluster);
  table.family("mbarrier", decode_mbarrier);
}

}  // namespace ptx
