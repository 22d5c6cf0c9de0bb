// Opcodes that do the same in every lane, one line each: the name without the type, the types, and
// what is computed.
#pragma once

#include "machine.h"

namespace ptx {

// Computes in all lanes, keeps those that count.
template <class To, class From, class F, size_t... kOperand>
void apply(Machine&, Warp& w, const Instruction& i, Mask lanes, std::index_sequence<kOperand...>) {
  To result[kLanes];
  const From* const in[] = {w.lanes<From>(i.in[kOperand])...};
  for (int l = 0; l < kLanes; ++l) result[l] = static_cast<To>(F()(in[kOperand][l]...));
  w.write(i.out[0], result, lanes);
}

template <class To, class From, class F, int kOperands>
void run(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  apply<To, From, F>(m, w, i, lanes, std::make_index_sequence<kOperands>());
}

template <class Type, class To, int kOperands, class F>
void add_one(Table& table, const std::string& name, F) {
  using T = typename Type::type;
  table.add(name + "." + Type::name, [](Decoder& d) {
    d.out(0, sizeof(To));
    for (int i = 1; i <= kOperands; ++i) d.in(i, sizeof(T));
    d.made.run = run<To, T, F, kOperands>;
  });
}

template <class... Types, class F>
void unary(Table& table, const std::string& name, F f) {
  (add_one<Types, typename Types::type, 1>(table, name, f), ...);
}
template <class... Types, class F>
void binary(Table& table, const std::string& name, F f) {
  (add_one<Types, typename Types::type, 2>(table, name, f), ...);
}
template <class... Types, class F>
void ternary(Table& table, const std::string& name, F f) {
  (add_one<Types, typename Types::type, 3>(table, name, f), ...);
}

}  // namespace ptx
