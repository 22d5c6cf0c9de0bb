// Fences, and release and acquire through words of global memory.
#include "synchronise.h"

namespace ptx {

void hear(Machine& m, Warp& warp, u64 address, Order order, Scope scope) {
  const auto found = m.published.find(address);
  if (found == m.published.end()) return;
  for (auto& [cta, told] : found->second) {
    const Scope needed = scope_of(cta, warp.cta->id, m.launch.cluster);
    if (scope >= needed) (acquires(order) ? warp.known : warp.heard[needed]).join(told[needed]);
  }
}

void tell(Machine& m, Warp& warp, u64 address, Order order, Scope scope, bool adds) {
  auto& word = m.published[address];
  if (!adds) word.clear();
  KnowledgeByScope& told = word[warp.cta->id];
  for (const Scope s : kScopes) {
    if (s <= scope) told[s].join(releases(order) ? warp.known : warp.announced[s]);
  }
}

void before_release(Machine& m, Warp& warp, Scope scope) {
  if (scope != Scope::kCta) m.commit_known(warp, warp.known);
}

namespace {

enum Number { kScope, kAcquires, kReleases };

void fence(Machine& m, Warp& w, const Instruction& i, Mask) {
  const Scope scope = static_cast<Scope>(i.number[kScope]);
  if (i.number[kAcquires]) {
    for (const Scope s : kScopes) {
      if (s <= scope) w.known.join(w.heard[s]);
    }
  }
  if (i.number[kReleases]) {
    before_release(m, w, scope);
    for (const Scope s : kScopes) {
      if (s <= scope) w.announced[s] = w.known;
    }
  }
  m.tick(w);
}

void proxy_fence(Machine& m, Warp& w, const Instruction& i, Mask) {
  for (int space = 0; space < kSpaces; ++space) {
    if (i.number[static_cast<size_t>(space)]) w.known.fenced[space].join(w.known.happened);
  }
  if (i.number[kGlobal]) m.commit_known(w, w.known);
  m.tick(w);
}

void init_fence(Machine& m, Warp& w, const Instruction&, Mask) {
  w.inits_announced = w.time;
  m.tick(w);
}

void decode_fence(Decoder& d) {
  d.made.flow = Flow::kSwitch;
  if (d.modifiers.take("proxy")) {
    const int kind =
        d.modifiers.take_one({"async", "async::generic", "alias", "tensormap::generic"});
    if (kind == 2 || kind == 3) throw Failure("a proxy that is not modelled");
    const int space = d.modifiers.take_any({"global", "shared::cta", "shared::cluster"}, -1);
    if (kind == 1) {
      d.modifiers.take_any({"acquire", "release"}, 0);
      d.modifiers.take("sync_restrict");
      take_scope(d.modifiers, Scope::kCluster);
    }
    d.made.number = {space != 0, space <= 0};
    d.made.run = proxy_fence;
  } else if (d.modifiers.take("mbarrier_init")) {
    d.modifiers.take_one({"release"});
    d.modifiers.take_one({"cluster"});
    d.made.run = init_fence;
  } else {
    const int kind = d.modifiers.take_any({"acq_rel", "sc", "acquire", "release"}, 0);
    const bool acquires = kind != 3, releases = kind != 2;
    d.made.number = {static_cast<s64>(take_scope(d.modifiers, Scope::kGpu)), acquires, releases};
    d.made.run = fence;
  }
}

void decode_membar(Decoder& d) {
  const bool narrow = d.modifiers.take_one({"cta", "gl", "sys"}) == 0;
  d.made.number = {static_cast<s64>(narrow ? Scope::kCta : Scope::kGpu), true, true};
  d.made.run = fence;
  d.made.flow = Flow::kSwitch;
}

}  // namespace

void add_fences(Table& table) {
  table.family("fence", decode_fence);
  table.family("membar", decode_membar);
}

}  // namespace ptx
