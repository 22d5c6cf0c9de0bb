// atom and red on global memory.
#include "synchronise.h"

namespace ptx {
namespace {

enum Number { kOffsetNumber, kOrder, kScope, kReturns };

struct Add {
  template <class T>
  T operator()(T old, T value, T) const {
    return static_cast<T>(old + value);
  }
};
struct Exchange {
  template <class T>
  T operator()(T, T value, T) const {
    return value;
  }
};
struct Compare {
  template <class T>
  T operator()(T old, T expected, T value) const {
    return old == expected ? value : old;
  }
};
struct Least {
  template <class T>
  T operator()(T old, T value, T) const {
    return std::min(old, value);
  }
};
struct Most {
  template <class T>
  T operator()(T old, T value, T) const {
    return std::max(old, value);
  }
};

template <class T, class Operation>
void run(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  const Order order = static_cast<Order>(i.number[kOrder]);
  const Scope scope = static_cast<Scope>(i.number[kScope]);
  if (releases(order)) before_release(m, w, scope);
  u64 addresses[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    const u64 at = addresses[l] = w.value(i.in[0], l) + static_cast<u64>(i.number[kOffsetNumber]);
    if (at % sizeof(T) != 0) m.fail(w, "misaligned global address");
    Access access{w.agent(kWrite), w.time, w.pc(), true};
    access.strength = Strength::kAtomic;
    access.scope = scope;
    m.touch_global(w, at, sizeof(T), access);
    m.commit(*w.cta, at, sizeof(T));
    T& word = *reinterpret_cast<T*>(at);
    const T old = word;
    const T value = w.lanes<T>(i.in[1])[l], other = i.in.size() > 2 ? w.lanes<T>(i.in[2])[l] : T{};
    word = Operation()(old, value, other);
    hear(m, w, at, order, scope);
    tell(m, w, at, order, scope, true);
    if (i.number[kReturns] && i.out[0].bytes != 0) w.lanes<T>(i.out[0])[l] = old;
    if (bits<std::conditional_t<sizeof(T) == 4, u32, u64>>(word) !=
        bits<std::conditional_t<sizeof(T) == 4, u32, u64>>(old)) {
      m.news();
    } else if (l == __builtin_ctz(lanes)) {
      m.poll(w, at, static_cast<u64>(old));
    }
  }
  if (releases(order)) m.tick(w);
  m.count_global(w, lanes, addresses, sizeof(T));
}

template <class T>
Handler choose(int operation) {
  switch (operation) {
    case 0:
      return run<T, Add>;
    case 1:
      return run<T, Exchange>;
    case 2:
      return run<T, Compare>;
    case 3:
      return run<T, Least>;
    default:
      return run<T, Most>;
  }
}

template <bool kReturning>
void decode(Decoder& d) {
  d.modifiers.take("global");
  d.modifiers.take_cache_hints();
  const Order order = take_order(d.modifiers, Order::kRelaxed);
  const Scope scope = take_scope(d.modifiers, Scope::kGpu);
  const int operation = d.modifiers.take_one({"add", "exch", "cas", "min", "max"});
  const std::string type = d.modifiers.take_type();
  const int bytes = type_bytes(type), address = kReturning ? 1 : 0;
  d.made.number = {d.address(address, 8), static_cast<s64>(order), static_cast<s64>(scope),
                   kReturning};
  if (kReturning) d.out(0, bytes);
  d.in(address + 1, bytes);
  if (operation == 2) d.in(address + 2, bytes);
  if (type == "f32" && operation == 0)
    d.made.run = run<float, Add>;
  else if (type == "s32")
    d.made.run = choose<s32>(operation);
  else if (type == "s64")
    d.made.run = choose<s64>(operation);
  else if (type == "u32" || type == "b32")
    d.made.run = choose<u32>(operation);
  else if (type == "u64" || type == "b64")
    d.made.run = choose<u64>(operation);
  else
    throw Failure("an atomic of a type that is not modelled");
  d.made.flow = Flow::kSwitch;
}

}  // namespace

void add_atomics(Table& table) {
  table.family("atom", decode<true>);
  table.family("red", decode<false>);
}

}  // namespace ptx
