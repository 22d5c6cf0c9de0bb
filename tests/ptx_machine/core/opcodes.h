// The files that fill the table of opcodes, and what they share.
#pragma once

#include "clocks.h"
#include "program.h"

namespace ptx {

void add_arithmetic(Table& table);   // alu.cpp
void add_bits(Table& table);         // bits.cpp
void add_predicates(Table& table);   // predicates.cpp
void add_conversions(Table& table);  // convert.cpp
void add_control(Table& table);      // control.cpp
void add_memory(Table& table);       // memory.cpp
void add_atomics(Table& table);      // atomics.cpp
void add_fences(Table& table);       // fences.cpp
void add_barriers(Table& table);     // barriers.cpp
void add_cp_async(Table& table);     // cp_async.cpp
void add_tma(Table& table);          // tma.cpp
void add_mma(Table& table);          // mma.cpp
void add_wgmma(Table& table);        // wgmma.cpp

enum class Order : u8 { kWeak, kRelaxed, kAcquire, kRelease, kAcquireRelease };

inline bool acquires(Order order) {
  return order == Order::kAcquire || order == Order::kAcquireRelease;
}
inline bool releases(Order order) {
  return order == Order::kRelease || order == Order::kAcquireRelease;
}

inline Scope take_scope(Modifiers& modifiers, Scope otherwise) {
  const int found = modifiers.take_any({"cta", "cluster", "gpu", "sys"}, -1);
  return found < 0 ? otherwise : kScopes[std::min(found, 2)];  // the system is this GPU
}

inline Order take_order(Modifiers& modifiers, Order otherwise) {
  const int found =
      modifiers.take_any({"weak", "relaxed", "acquire", "release", "acq_rel", "volatile"}, -1);
  if (found == 5) return Order::kRelaxed;
  return found < 0 ? otherwise : static_cast<Order>(found);
}

}  // namespace ptx
