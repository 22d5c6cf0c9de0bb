// Who moves next: a seed decides, within what the ISA leaves open.
#include <sstream>

#include "machine.h"

namespace ptx {

void Machine::fail(const Warp& warp, const std::string& what) const {
  throw Failure(what + "; " + describe(warp));
}

void Machine::report(const Warp& warp, const std::string& what) {
  races.found.insert(what + " at line " + std::to_string(races.lines[warp.pc()]));
}

std::string Machine::describe(const Warp& warp) const {
  std::ostringstream text;
  text << "CTA " << warp.cta->id << " warp " << warp.index << ":";
  for (const Fragment& fragment : warp.fragments) {
    const Instruction& at = program.code[fragment.pc];
    text << " line " << at.line << " (" << program.opcodes[at.opcode] << ")";
    if (fragment.lanes != kAll) text << " lanes " << std::hex << fragment.lanes << std::dec;
  }
  if (!warp.waits_for.empty()) text << " waits for " << warp.waits_for;
  return text.str();
}

void Machine::dead_end() {
  std::string text = "nothing moves any more";
  for (const auto& cluster : clusters_) {
    for (const auto& cta : cluster->ctas) {
      for (const Warp& warp : cta->warps) {
        if (warp.state != Warp::kGone) text += "\n  " + describe(warp);
      }
    }
  }
  throw Failure(text);
}

void Machine::tick(Warp& warp) {
  ++warp.time;
  warp.know_itself();
}

u32 Machine::new_agent() {
  if (agents_ >= 0xFFFF) throw Failure("too many agents for the race detector");
  return agents_++;
}

// --- Sleeping and waking
// --------------------------------------------------------------------------

void Machine::sleep(Warp& warp, std::vector<Warp*>& list, std::string waits_for) {
  warp.yields = true;
  warp.waits_for = std::move(waits_for);
  bool others = false;  // can go on
  for (size_t i = 0; i < warp.fragments.size(); ++i) {
    others |= i != warp.current && !warp.fragments[i].parked;
    warp.fragments[i].behind = false;
  }
  if (others) return;
  warp.state = Warp::kAsleep;
  list.push_back(&warp);
}

void Machine::wake(std::vector<Warp*>& list) {
  for (Warp* warp : list) {
    if (warp->state != Warp::kAsleep && warp->state != Warp::kAtBarrier) continue;
    warp->state = Warp::kReady;
    ready_.push_back(warp);
  }
  list.clear();
}

void Machine::news() {
  ++news_;
  progress();
  wake(pollers_);
}

void Machine::poll(Warp& warp, u64 address, u64 value) {
  auto& last = warp.poll;
  if (last.pc == warp.pc() && last.address == address && last.value == value &&
      last.news == news_) {
    sleep(warp, pollers_, "another value than " + std::to_string(value) + " in global memory");
  }
  last = {warp.pc(), address, value, news_};
}

void Machine::later(std::function<void()> land) {
  static constexpr u32 kFarthest[] = {50, 3000, 1u << 30};  // the last: when nothing else moves
  const u32 farthest = random(4) == 0 ? kFarthest[laziness_] : 20 + kFarthest[laziness_] / 100;
  flights_.push_back({now_ + random(farthest), std::move(land)});
}

// --- Running
// ---------------------------------------------------------------------------------------

// Instructions without progress: more than any stretch of arithmetic, in all resident CTAs, takes.
constexpr u64 kPatience = 1'000'000;

void Machine::run() {
  while (active_ > 0 || clusters_.size() < clusters_total_) {
    ++now_;
    if (clusters_.size() < clusters_total_ && active_ < launch.resident &&
        (active_ == 0 || random(200) == 0)) {
      start_cluster();
    }
    if (random(4) == 0) engines();
    if (ready_.empty()) {
      if (!move_something()) dead_end();
      continue;
    }
    const u32 chosen = random(static_cast<u32>(ready_.size()));
    Warp& warp = *ready_[chosen];
    if (warp.state == Warp::kReady) slice(warp);
    if (warp.state != Warp::kReady) {
      ready_[chosen] = ready_.back();
      // What woke up in the slice stands behind it.
      ready_.pop_back();
    }
    if (instructions - last_progress_ > kPatience) dead_end();
    if (instructions > launch.limit) throw Failure("it goes on and on");
  }
  if (!flights_.empty()) throw Failure("a TMA load is on its way to a CTA that has left");
  for (const auto& cluster : clusters_) {
    for (const auto& cta : cluster->ctas) commit(*cta, 0, 0);
  }
}

void Machine::engines() {
  if (!flights_.empty()) {
    const u32 i = random(static_cast<u32>(flights_.size()));
    if (flights_[i].due <= now_) {
      const auto land = std::move(flights_[i].land);
      flights_[i] = std::move(flights_.back());
      flights_.pop_back();
      land();
    }
  }
  if (ready_.empty() || laziness_ == 2) return;
  Warp& warp = *ready_[random(static_cast<u32>(ready_.size()))];
  if (warp.state == Warp::kGone) return;
  if (!warp.copies.empty() && random(2)) {
    const u32 i = random(static_cast<u32>(warp.copies.size()));
    run_copy(warp, warp.copies[i]);
    warp.copies.erase(warp.copies.begin() + i);
  }
  if (!warp.stores.empty()) {
    BulkStore& store = warp.stores[random(static_cast<u32>(warp.stores.size()))];
    advance(warp, store, store.read);
  }
  if (random(8) == 0) {
    const auto& cluster = *clusters_[random(static_cast<u32>(clusters_.size()))];
    commit_some(*cluster.ctas[random(launch.cluster)]);
  }
}

// Nobody is ready: the slowest parts of the machine move now. Returns whether one did.
bool Machine::move_something() {
  if (!flights_.empty()) {
    const u32 i = random(static_cast<u32>(flights_.size()));
    const auto land = std::move(flights_[i].land);
    flights_[i] = std::move(flights_.back());
    flights_.pop_back();
    land();
    return true;
  }
  if (clusters_.size() < clusters_total_ && active_ < launch.resident) {
    start_cluster();
    return true;
  }
  bool moved = false;
  for (const auto& cluster : clusters_) {
    for (const auto& cta : cluster->ctas) {
      for (Warp& warp : cta->warps) {
        for (BulkStore& store : warp.stores) {
          moved |= !store.read || !store.pieces.empty();
          advance(warp, store, true);
        }
      }
      moved |= !cta->pending.empty();
      commit_some(*cta);
    }
  }
  if (moved) return true;
  if (last_rouse_ == last_progress_) return false;  // all were woken and nothing came of it
  last_rouse_ = last_progress_;
  for (const auto& cluster : clusters_) {
    for (const auto& cta : cluster->ctas) {
      for (Warp& warp : cta->warps) {
        if (warp.state != Warp::kAsleep) continue;
        warp.state = Warp::kReady;
        ready_.push_back(&warp);
      }
    }
  }
  return !ready_.empty();
}

void Machine::slice(Warp& warp) {
  warp.yields = false;
  for (u32 budget = 1 + random(quantum_); budget > 0;) {
    choose_fragment(warp);
    part(warp);
    const Flow flow = program.code[warp.pc()].flow;
    step(warp);
    if (warp.alive == 0) {
      finish(warp);
      return;
    }
    if (warp.state != Warp::kReady || warp.yields) return;
    if (flow == Flow::kSwitch || flow == Flow::kBranch) --budget;
  }
}

void Machine::choose_fragment(Warp& warp) {
  if (warp.fragments.size() == 1) {
    warp.current = 0;
    return;
  }
  std::vector<size_t> free;
  for (const bool behind : {false, true}) {
    if (!free.empty()) break;
    for (size_t i = 0; i < warp.fragments.size(); ++i) {
      Fragment& fragment = warp.fragments[i];
      if (behind) fragment.behind = false;
      if (!fragment.parked && !fragment.behind) free.push_back(i);
    }
  }
  if (free.empty()) fail(warp, "the lanes of a warp never come together");
  warp.current = free[random(static_cast<u32>(free.size()))];
  if (launch.adversarial && random(16) == 0) return;
  for (const size_t i : free) {
    if (warp.fragments[i].pc < warp.fragments[warp.current].pc) warp.current = i;
  }
}

// Lanes may part wherever an instruction does not ask for all of them: at an access to memory of
// their own some fall behind until the others wait for them.
void Machine::part(Warp& warp) {
  const Instruction& next = program.code[warp.pc()];
  if (!launch.adversarial || warp.fragments.size() > 1) return;
  if (next.gathers || next.once || next.flow != Flow::kSwitch || random(32) != 0) return;
  Fragment& here = warp.fragments[0];
  const Mask late = here.lanes & static_cast<Mask>(generator_());
  if (late == 0 || late == here.lanes) return;
  here.lanes &= ~late;
  warp.fragments.push_back({here.pc, late, false, true});
}

// Whether all lanes that an instruction wants are here; else this fragment waits for them.
bool Machine::gather(Warp& warp, const Instruction& instruction) {
  Fragment& here = warp.fragments[warp.current];
  Mask wanted = warp.alive;
  if (instruction.some) {
    wanted &= static_cast<Mask>(warp.value(instruction.in.back(), __builtin_ctz(here.lanes)));
  }
  if ((here.lanes & wanted) == wanted) return true;
  here.parked = true;
  return false;
}

void Machine::merge(Warp& warp) {
  for (size_t i = 0; i < warp.fragments.size(); ++i) {
    for (size_t j = warp.fragments.size(); --j > i;) {
      if (warp.fragments[i].pc != warp.fragments[j].pc) continue;
      warp.fragments[i].lanes |= warp.fragments[j].lanes;
      warp.fragments[i].parked = warp.fragments[i].behind = false;
      warp.fragments.erase(warp.fragments.begin() + static_cast<long>(j));
    }
  }
}

void Machine::branch(Warp& warp, const Instruction& instruction, Mask taken) {
  Fragment& here = warp.fragments[warp.current];
  const u32 target = static_cast<u32>(instruction.number[0]);
  const Mask rest = here.lanes & ~taken;
  if (taken == 0) {
    ++here.pc;
  } else if (rest == 0) {
    here.pc = target;
  } else {
    const u32 next = here.pc + 1;
    here = {target, taken};
    warp.fragments.push_back({next, rest});
  }
}

// The registers of a product on its way belong to it.
void Machine::check_registers(Warp& warp, const Instruction& instruction) {
  const auto holds = [](const std::vector<u32>& held, const std::vector<Slot>& slots) {
    return std::any_of(slots.begin(), slots.end(), [&](const Slot& slot) {
      return std::binary_search(held.begin(), held.end(), slot.at);
    });
  };
  const bool is_product = instruction.run == warp.products.front().instruction->run;
  if (holds(warp.read_by_products, instruction.out) ||
      (!is_product &&
       (holds(warp.accumulating, instruction.out) || holds(warp.accumulating, instruction.in)))) {
    report(warp, "a register of a product on its way is touched");
  }
}

void Machine::step(Warp& warp) {
  const u32 pc = warp.pc();
  const Instruction& instruction = program.code[pc];
  const Mask here = warp.fragments[warp.current].lanes;
  Mask lanes = here;
  if (instruction.guard >= 0) {
    const Mask guard =
        *reinterpret_cast<const Mask*>(&warp.file[static_cast<size_t>(instruction.guard)]);
    lanes &= instruction.negated ? ~guard : guard;
  }
  if (instruction.gathers && lanes != 0 && !gather(warp, instruction)) return;
  ++instructions;
  Counts& count = counts[pc];
  ++count.executed;
  count.lanes += static_cast<u64>(__builtin_popcount(lanes));
  if (!warp.products.empty()) check_registers(warp, instruction);
  switch (instruction.flow) {
    case Flow::kBranch:
      branch(warp, instruction, lanes);
      break;
    case Flow::kExit:
      warp.alive &= ~lanes;
      if ((here & ~lanes) != 0) {
        warp.fragments[warp.current] = {pc + 1, here & ~lanes};
      } else if (warp.alive != 0) {
        warp.fragments.erase(warp.fragments.begin() + static_cast<long>(warp.current));
        warp.current = 0;
      }
      for (Fragment& fragment : warp.fragments) fragment.parked = fragment.behind = false;
      break;
    default:
      warp.again = false;
      if (lanes != 0) instruction.run(*this, warp, instruction, lanes);
      if (warp.again) {
        --count.executed;
      } else {
        warp.fragments[warp.current].pc = pc + 1;
      }
  }
  if (warp.fragments.size() > 1) merge(warp);
}

}  // namespace ptx
