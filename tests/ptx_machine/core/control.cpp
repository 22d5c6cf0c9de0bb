// Branches, what lanes of a warp tell each other, and instructions that only advise.
#include "machine.h"

namespace ptx {
namespace {

#define PTX_LANES                  \
  for (int l = 0; l < kLanes; ++l) \
    if (lanes >> l & 1)

void shuffle(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  u32 values[kLanes] = {};
  Mask valid = 0;
  PTX_LANES {
    const u32 clamp = w.lanes<u32>(i.in[2])[l], b = w.lanes<u32>(i.in[1])[l] & 31;
    const int segment = static_cast<int>(clamp >> 8 & 31), c = static_cast<int>(clamp & 31);
    const int most = (l & segment) | (c & ~segment), least = l & segment;
    int from = 0;
    bool ok = false;
    switch (i.number[0]) {
      case 0:
        from = least | (static_cast<int>(b) & ~segment);
        ok = from <= most;
        break;
      case 1:
        from = l - static_cast<int>(b);
        ok = from >= most;
        break;
      case 2:
        from = l + static_cast<int>(b);
        ok = from <= most;
        break;
      case 3:
        from = l ^ static_cast<int>(b);
        ok = from <= most;
        break;
    }
    if (!ok) from = l;
    values[l] = w.lanes<u32>(i.in[0])[from & 31];
    if (ok) valid |= 1u << l;
  }
  w.write(i.out[0], values, lanes);
  if (i.out.size() > 1) w.write_predicate(i.out[1], valid, lanes);
}

void decode_shuffle(Decoder& d) {
  d.modifiers.take_one({"sync"});
  d.made.number = {d.modifiers.take_one({"idx", "up", "down", "bfly"})};
  d.modifiers.take_one({"b32"});
  d.out(0, 4);
  if (d.parts(0) > 1) d.out_predicate(0, 1);
  for (int i = 1; i < 5; ++i) d.in(i, 4);
  d.made.gathers = d.made.some = true;
  d.made.run = shuffle;
}

void elect(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  const int leader = __builtin_ctz(w.lanes<u32>(i.in[0])[__builtin_ctz(lanes)] & w.alive);
  if (i.out[0].bytes != 0) {
    PTX_LANES w.set(i.out[0], l, static_cast<u64>(leader));
  }
  w.write_predicate(i.out[1], 1u << leader, lanes);
}

void decode_elect(Decoder& d) {
  d.modifiers.take_one({"sync"});
  d.out(0, 4);
  d.out_predicate(0, 1);
  d.in(1, 4);
  d.made.gathers = d.made.some = true;
  d.made.run = elect;
}

void vote(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  const Mask votes = w.predicate(i.in[0]) & lanes;
  if (i.number[0] == 0) {
    PTX_LANES w.set(i.out[0], l, votes);
    return;
  }
  const bool result = i.number[0] == 1   ? votes != 0
                      : i.number[0] == 2 ? votes == lanes
                                         : votes == 0 || votes == lanes;
  w.write_predicate(i.out[0], result ? kAll : 0, lanes);
}

void decode_vote(Decoder& d) {
  d.modifiers.take_one({"sync"});
  const int kind = d.modifiers.take_one({"ballot", "any", "all", "uni"});
  d.modifiers.take_one({kind == 0 ? "b32" : "pred"});
  d.made.number = {kind};
  kind == 0 ? d.out(0, 4) : d.out_predicate(0);
  d.in_predicate(1);
  d.in(2, 4);
  d.made.gathers = d.made.some = true;
  d.made.run = vote;
}

// The registers of a CTA are a pool: what one warpgroup gives up another may claim, no more.
void set_registers(Machine& m, Warp& w, const Instruction& i, Mask) {
  const int wanted = i.registers, more = (wanted - w.registers) * 32;
  if (wanted % 8 != 0 || wanted < 24 || wanted > 256)
    m.fail(w, "setmaxnreg of a count that is not allowed");
  if (i.number[0] ? more < 0 : more > 0) m.fail(w, "setmaxnreg in the wrong direction");
  if (more > w.cta->registers_free) {
    w.again = w.yields = true;
    w.waits_for = "registers";
    return;
  }
  w.waits_for.clear();
  w.cta->registers_free -= more;
  w.registers = wanted;
  m.progress();
}

void decode_set_registers(Decoder& d) {
  const int kind = d.modifiers.take_one({"dec", "inc"});
  for (const char* name : {"sync", "aligned", "u32"}) d.modifiers.take_one({name});
  d.made.number = {kind};
  d.made.registers = static_cast<int>(d.immediate(0));
  d.made.gathers = true;
  d.made.flow = Flow::kSwitch;
  d.made.run = set_registers;
}

void mapa(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  PTX_LANES {
    const u32 rank = w.lanes<u32>(i.in[1])[l];
    if (rank >= w.cta->cluster->ctas.size()) m.fail(w, "mapa to no CTA of the cluster");
    w.lanes<u32>(i.out[0])[l] = (w.lanes<u32>(i.in[0])[l] & kOffset) | rank << kRankShift;
  }
}

void decode_mapa(Decoder& d) {
  d.modifiers.take_one({"shared::cluster"});
  d.modifiers.take_one({"u32"});
  d.out(0, 4);
  d.in(1, 4);
  d.in(2, 4);
  d.made.run = mapa;
}

void decode_branch(Decoder& d) {
  d.modifiers.take("uni");
  d.made.number = {d.label(0)};
  d.made.flow = Flow::kBranch;
}

void nothing(Machine&, Warp&, const Instruction&, Mask) {}

void trap(Machine& m, Warp& w, const Instruction&, Mask) { m.fail(w, "trap"); }

}  // namespace

void add_control(Table& table) {
  table.family("bra", decode_branch);
  for (const char* name : {"ret", "exit"}) {
    table.add(name, [](Decoder& d) { d.made.flow = Flow::kExit; });
  }
  table.add("trap", [](Decoder& d) { d.made.run = trap; });
  table.family("shfl", decode_shuffle);
  table.family("elect", decode_elect);
  table.family("vote", decode_vote);
  table.family("setmaxnreg", decode_set_registers);
  table.family("mapa", decode_mapa);
  for (const char* name : {"nop", "griddepcontrol.wait", "griddepcontrol.launch_dependents",
                           "prefetch.tensormap", "prefetch.param.tensormap", "nanosleep.u32"}) {
    table.add(name, [](Decoder& d) { d.made.run = nothing; });
  }
}

}  // namespace ptx
