// Fences, and release and acquire through words of global memory.
#include "synchronise.h"

namespace ptx {

void hear(Machine& m, Warp& warp, u64 address, Order order, Scope scope) {
  const auto found = m.published.find(address);
  if (found == m.published.end()) return;
  for (const Published& said : found->second) {
    const bool same_cta = said.cta == warp.cta->id;
    const bool reaches = same_cta || (said.scope == Scope::kGpu && scope == Scope::kGpu) ||
                         (said.scope >= Scope::kCluster && scope >= Scope::kCluster &&
                          said.cta / m.launch.cluster == warp.cta->id / m.launch.cluster);
    if (reaches) (acquires(order) ? warp.known : warp.heard).join(said.knowledge);
  }
}

void tell(Machine& m, Warp& warp, u64 address, Order order, Scope scope, bool adds) {
  auto& word = m.published[address];
  if (!adds) word.clear();
  const bool release = releases(order);
  if (!release && !warp.announces) return;
  for (Published& said : word) {
    if (said.cta == warp.cta->id && said.scope == scope) {
      said.knowledge.join(release ? warp.known : warp.announced);
      return;
    }
  }
  word.push_back({warp.cta->id, scope, release ? warp.known : warp.announced});
}

void before_release(Machine& m, Warp& warp, Scope scope) {
  if (scope != Scope::kCta) m.commit_known(warp, warp.known);
}

namespace {

void fence(Machine& m, Warp& w, const Instruction& i, Mask) {
  w.known.join(w.heard);
  // A narrower fence announces nothing to other CTAs, but what the wider one before it did.
  if (static_cast<Scope>(i.number[0]) != Scope::kCta) {
    before_release(m, w, Scope::kGpu);
    w.announced = w.known;
    w.announces = true;
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
    d.modifiers.take_any({"acq_rel", "sc", "acquire", "release"}, 0);
    d.made.number = {static_cast<s64>(take_scope(d.modifiers, Scope::kGpu))};
    d.made.run = fence;
  }
}

void decode_membar(Decoder& d) {
  static constexpr Scope kScopes[] = {Scope::kCta, Scope::kGpu, Scope::kGpu};
  d.made.number = {static_cast<s64>(kScopes[d.modifiers.take_one({"cta", "gl", "sys"})])};
  d.made.run = fence;
  d.made.flow = Flow::kSwitch;
}

}  // namespace

void add_fences(Table& table) {
  table.family("fence", decode_fence);
  table.family("membar", decode_membar);
}

}  // namespace ptx
