// ld and st; ldmatrix and stmatrix are in mma.cpp.
#include "machine.h"
#include "synchronise.h"

namespace ptx {
namespace {

enum Number { kOffsetNumber, kBytes, kCluster, kOrder, kScope };

bool is_signed(const std::string& type) { return type[0] == 's'; }

u64 extend(u64 value, int bytes, u32 to_bytes, bool sign) {
  if (!sign || bytes >= static_cast<int>(to_bytes)) return value;
  const int shift = 64 - 8 * bytes;
  return static_cast<u64>(static_cast<s64>(value << shift) >> shift);
}

template <bool kSigned>
void put(Warp& w, const Instruction& i, int lane, const u8* from, int bytes) {
  for (size_t part = 0; part < i.out.size(); ++part) {
    if (i.out[part].bytes == 0) continue;
    u64 value = 0;
    std::memcpy(&value, from + part * static_cast<size_t>(bytes), static_cast<size_t>(bytes));
    w.set(i.out[part], lane, extend(value, bytes, i.out[part].bytes, kSigned));
  }
}

void take(const Warp& w, const Instruction& i, int lane, u8* to, int bytes) {
  for (size_t part = 1; part < i.in.size(); ++part) {
    const u64 value = w.value(i.in[part], lane);
    std::memcpy(to + (part - 1) * static_cast<size_t>(bytes), &value, static_cast<size_t>(bytes));
  }
}

template <bool kSigned>
void load_parameter(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    const u64 at = w.value(i.in[0], l) + static_cast<u64>(i.number[kOffsetNumber]);
    put<kSigned>(w, i, l, m.parameters() + at, static_cast<int>(i.number[kBytes]));
  }
}

template <bool kSigned>
void load_shared(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  const int bytes = static_cast<int>(i.number[kBytes]);
  const u32 all = static_cast<u32>(bytes) * static_cast<u32>(i.out.size());
  u32 addresses[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    addresses[l] =
        static_cast<u32>(w.value(i.in[0], l) + static_cast<u64>(i.number[kOffsetNumber]));
    Cta& cta = m.owner(w, addresses[l], i.number[kCluster]);
    const u8* from = m.shared(w, cta, addresses[l], all);
    const Access access{w.agent(kRead), w.time, w.pc(), false};
    m.touch_shared(cta, addresses[l], all, access, w.known);
    m.visit(w, cta, access);
    put<kSigned>(w, i, l, from, bytes);
  }
  m.count_banks(w, lanes, addresses, all);
}

void store_shared(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  const int bytes = static_cast<int>(i.number[kBytes]);
  const u32 all = static_cast<u32>(bytes) * static_cast<u32>(i.in.size() - 1);
  u32 addresses[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    addresses[l] =
        static_cast<u32>(w.value(i.in[0], l) + static_cast<u64>(i.number[kOffsetNumber]));
    Cta& cta = m.owner(w, addresses[l], i.number[kCluster]);
    u8* to = m.shared(w, cta, addresses[l], all);
    u8 data[16];
    take(w, i, l, data, bytes);
    Access access{w.agent(kWrite), w.time, w.pc(), true};
    access.rewrites = std::memcmp(to, data, all) == 0;
    m.touch_shared(cta, addresses[l], all, access, w.known);
    m.visit(w, cta, access);
    std::memcpy(to, data, all);
  }
  m.count_banks(w, lanes, addresses, all);
}

template <bool kSigned>
void load_global(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  const int bytes = static_cast<int>(i.number[kBytes]);
  const u32 all = static_cast<u32>(bytes) * static_cast<u32>(i.out.size());
  const Order order = static_cast<Order>(i.number[kOrder]);
  const Scope scope = static_cast<Scope>(i.number[kScope]);
  u64 addresses[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    const u64 at = addresses[l] = w.value(i.in[0], l) + static_cast<u64>(i.number[kOffsetNumber]);
    if (at % all != 0) m.fail(w, "misaligned global address");
    Access access{w.agent(kRead), w.time, w.pc(), false};
    if (order != Order::kWeak) access.strength = Strength::kStrong;
    access.scope = scope;
    m.touch_global(w, at, all, access);
    u8 data[32];
    m.load(*w.cta, at, data, all);
    put<kSigned>(w, i, l, data, bytes);
    if (order != Order::kWeak) {
      hear(m, w, at, order, scope);
      u64 value = 0;
      std::memcpy(&value, data, std::min(all, 8u));
      if (l == __builtin_ctz(lanes)) m.poll(w, at, value);
    }
  }
  m.count_global(w, lanes, addresses, all);
}

void store_global(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  const int bytes = static_cast<int>(i.number[kBytes]);
  const u32 all = static_cast<u32>(bytes) * static_cast<u32>(i.in.size() - 1);
  const Order order = static_cast<Order>(i.number[kOrder]);
  const Scope scope = static_cast<Scope>(i.number[kScope]);
  u64 addresses[kLanes];
  if (releases(order)) before_release(m, w, scope);
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    const u64 at = addresses[l] = w.value(i.in[0], l) + static_cast<u64>(i.number[kOffsetNumber]);
    if (at % all != 0) m.fail(w, "misaligned global address");
    u8 data[32];
    take(w, i, l, data, bytes);
    Access access{w.agent(kWrite), w.time, w.pc(), true};
    if (order != Order::kWeak) access.strength = Strength::kStrong;
    access.scope = scope;
    m.touch_global(w, at, all, access);
    if (order == Order::kWeak) {
      m.store_weak(*w.cta, at, data, all, w.agent(kWrite), w.time);
    } else {
      m.commit(*w.cta, at, all);
      std::memcpy(reinterpret_cast<void*>(at), data, all);
      tell(m, w, at, order, scope, false);
      m.news();
    }
  }
  if (releases(order)) m.tick(w);
  m.count_global(w, lanes, addresses, all);
}

template <bool kLoad>
void decode(Decoder& d) {
  Instruction& made = d.made;
  Modifiers& modifiers = d.modifiers;
  static const std::vector<std::string> kSpaces = {"global", "shared::cta", "shared::cluster",
                                                   "shared", "param",       "param::entry"};
  const int space = modifiers.take_one(kSpaces);
  modifiers.take_cache_hints();
  if (kLoad) modifiers.take("nc");
  const Order order = take_order(modifiers, Order::kWeak);
  const Scope scope = take_scope(modifiers, Scope::kGpu);
  const std::string type = modifiers.take_type();
  const int bytes = type_bytes(type), vector = modifiers.take_vector();
  const bool shared = space >= 1 && space <= 3, sign = is_signed(type);
  const int address = kLoad ? 1 : 0, value = kLoad ? 0 : 1;
  if (d.parts(value) != vector) throw Failure("the vector has another length");
  if (shared && order > Order::kRelaxed) throw Failure("an ordered access to shared memory");
  made.number = {d.address(address, space == 0 || space >= 4 ? 8 : 4), bytes, space == 2,
                 static_cast<s64>(order), static_cast<s64>(scope)};
  for (int part = 0; part < vector; ++part) {
    kLoad ? d.out_wider(value, bytes, part) : d.in_wider(value, bytes, part);
  }
  made.flow = Flow::kSwitch;
  if (!kLoad) {
    if (space >= 4) throw Failure("a store to parameters");
    made.run = shared ? store_shared : store_global;
  } else if (space >= 4) {
    made.flow = Flow::kNext;
    made.run = sign ? load_parameter<true> : load_parameter<false>;
  } else if (shared) {
    made.run = sign ? load_shared<true> : load_shared<false>;
  } else {
    made.run = sign ? load_global<true> : load_global<false>;
  }
}

}  // namespace

void add_memory(Table& table) {
  table.family("ld", decode<true>);
  table.family("st", decode<false>);
}

}  // namespace ptx
