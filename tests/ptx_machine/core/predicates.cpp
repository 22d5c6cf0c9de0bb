// Comparisons, selections, and logic on predicates.
#include <cmath>
#include <type_traits>

#include "machine.h"

namespace ptx {
namespace {

template <class T>
bool compare(int how, T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    const bool nan = std::isnan(a) || std::isnan(b);
    if (how == 1 && nan) return false;
    if (how >= 6 && how < 12 && nan) return true;
    if (how == 12) return !nan;
    if (how == 13) return nan;
    if (how >= 6) how -= 6;
  }
  switch (how) {
    case 0:
      return a == b;
    case 1:
      return a != b;
    case 2:
      return a < b;
    case 3:
      return a <= b;
    case 4:
      return a > b;
    default:
      return a >= b;
  }
}

// setp.how.bool.type p|q, a, b, c: p = (a how b) bool c, q = !(a how b) bool c.
template <class T>
void set_predicate(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  const T *a = w.lanes<T>(i.in[0]), *b = w.lanes<T>(i.in[1]);
  Mask p = 0;
  for (int l = 0; l < kLanes; ++l)
    p |= static_cast<Mask>(compare(static_cast<int>(i.number[0]), a[l], b[l])) << l;
  Mask q = ~p;
  if (i.in.size() > 2) {
    const Mask c = i.number[2] ? ~w.predicate(i.in[2]) : w.predicate(i.in[2]);
    for (Mask* x : {&p, &q}) *x = i.number[1] == 0 ? *x & c : i.number[1] == 1 ? *x | c : *x ^ c;
  }
  w.write_predicate(i.out[0], p, lanes);
  if (i.out.size() > 1) w.write_predicate(i.out[1], q, lanes);
}

template <class... Types>
void comparisons(Table& table) {
  table.family("setp", [](Decoder& d) {
    static const std::vector<std::string> kHow = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",
                                                  "equ", "neu", "ltu", "leu", "gtu", "geu",
                                                  "num", "nan", "lo",  "ls",  "hi",  "hs"};
    int how = d.modifiers.take_one(kHow);
    if (how > 13) how -= 12;  // the unsigned names of lt, le, gt, ge
    const int boolean = d.modifiers.take_any({"and", "or", "xor"}, -1);
    const std::string type = d.modifiers.take_type();
    d.made.number = {how, boolean};
    d.out_predicate(0);
    if (d.parts(0) > 1) d.out_predicate(0, 1);
    ((type == Types::name &&
      (d.in(1, sizeof(typename Types::type)), d.in(2, sizeof(typename Types::type)),
       d.made.run = set_predicate<typename Types::type>, true)) ||
     ...);
    if (d.made.run == nullptr) throw Failure("it does not compare ." + type);
    if (boolean >= 0) d.in_predicate(3);
  });
}

template <class F>
void on_predicates(Table& table, const std::string& name, int operands, F) {
  table.add(name, [operands](Decoder& d) {
    d.out_predicate(0);
    for (int i = 1; i <= operands; ++i) d.in_predicate(i);
    d.made.run = [](Machine&, Warp& w, const Instruction& i, Mask lanes) {
      const Mask b = i.in.size() > 1 ? w.predicate(i.in[1]) : 0;
      w.write_predicate(i.out[0], F()(w.predicate(i.in[0]), b), lanes);
    };
  });
}

template <class T>
void select(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  T result[kLanes];
  const T *a = w.lanes<T>(i.in[0]), *b = w.lanes<T>(i.in[1]);
  const Mask p = w.predicate(i.in[2]);
  for (int l = 0; l < kLanes; ++l) result[l] = p >> l & 1 ? a[l] : b[l];
  w.write(i.out[0], result, lanes);
}

template <class... Types>
void selections(Table& table) {
  (table.add(std::string("selp.") + Types::name,
             [](Decoder& d) {
               using T = typename Types::type;
               d.out(0, sizeof(T)), d.in(1, sizeof(T)), d.in(2, sizeof(T)), d.in_predicate(3);
               d.made.run = select<T>;
             }),
   ...);
}

}  // namespace

void add_predicates(Table& t) {
  comparisons<B16, B32, B64, U16, S16, U32, S32, U64, S64, F32, F64>(t);
  selections<B16, B32, B64, U16, S16, U32, S32, U64, S64, F32, F64>(t);
  on_predicates(t, "and.pred", 2, [](Mask a, Mask b) { return a & b; });
  on_predicates(t, "or.pred", 2, [](Mask a, Mask b) { return a | b; });
  on_predicates(t, "xor.pred", 2, [](Mask a, Mask b) { return a ^ b; });
  on_predicates(t, "not.pred", 1, [](Mask a, Mask) { return ~a; });
  on_predicates(t, "mov.pred", 1, [](Mask a, Mask) { return a; });
}

}  // namespace ptx
