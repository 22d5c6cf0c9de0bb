// Arithmetic, one line an opcode: its name without the type, the types, and what it computes.
//
// To add one, add its line; to add a type to one, name it there.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "machine.h"

namespace ptx {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

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

// --- Shifts, whose count is a u32 whatever is shifted
// -------------------------------------------------

template <class T, bool kLeft>
void shift(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  constexpr u32 kBits = 8 * sizeof(T);
  T result[kLanes];
  const T* a = w.lanes<T>(i.in[0]);
  const u32* b = w.lanes<u32>(i.in[1]);
  for (int l = 0; l < kLanes; ++l) {
    if constexpr (kLeft) {
      result[l] = b[l] >= kBits ? T{0} : static_cast<T>(a[l] << b[l]);
    } else if constexpr (std::is_signed_v<T>) {
      result[l] = static_cast<T>(a[l] >> std::min(b[l], kBits - 1));
    } else {
      result[l] = b[l] >= kBits ? T{0} : static_cast<T>(a[l] >> b[l]);
    }
  }
  w.write(i.out[0], result, lanes);
}

template <bool kLeft, class... Types>
void shifts(Table& table, const std::string& name) {
  (table.add(name + "." + Types::name,
             [](Decoder& d) {
               d.out(0, sizeof(typename Types::type));
               d.in(1, sizeof(typename Types::type));
               d.in(2, 4);
               d.made.run = shift<typename Types::type, kLeft>;
             }),
   ...);
}

// --- Wide products
// ------------------------------------------------------------------------------------

template <class To, class From, bool kAdds>
void wide(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  To result[kLanes];
  const From *a = w.lanes<From>(i.in[0]), *b = w.lanes<From>(i.in[1]);
  for (int l = 0; l < kLanes; ++l)
    result[l] = static_cast<To>(static_cast<To>(a[l]) * static_cast<To>(b[l]));
  if constexpr (kAdds) {
    const To* c = w.lanes<To>(i.in[2]);
    for (int l = 0; l < kLanes; ++l)
      result[l] = static_cast<To>(static_cast<u64>(result[l]) + static_cast<u64>(c[l]));
  }
  w.write(i.out[0], result, lanes);
}

template <class Type, class To>
void wides(Table& table) {
  using From = typename Type::type;
  table.add(std::string("mul.wide.") + Type::name, [](Decoder& d) {
    d.out(0, sizeof(To)), d.in(1, sizeof(From)), d.in(2, sizeof(From));
    d.made.run = wide<To, From, false>;
  });
  table.add(std::string("mad.wide.") + Type::name, [](Decoder& d) {
    d.out(0, sizeof(To)), d.in(1, sizeof(From)), d.in(2, sizeof(From)), d.in(3, sizeof(To));
    d.made.run = wide<To, From, true>;
  });
}

// --- Comparisons and predicates
// -------------------------------------------------------------------------

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

// --- Bit fields
// -----------------------------------------------------------------------------------------

template <class T>
T extract(T value, u32 position, u32 length) {
  constexpr u32 kBits = 8 * sizeof(T);
  position &= 255, length &= 255;
  const auto bit = [&](u32 at) {
    return static_cast<Unsigned<T>>(value) >> std::min(at, kBits - 1) & 1;
  };
  const Unsigned<T> fill =
      std::is_signed_v<T> && length != 0 ? bit(std::min(position + length - 1, kBits - 1)) : 0;
  Unsigned<T> result = 0;
  for (u32 i = 0; i < kBits; ++i) {
    result |=
        static_cast<Unsigned<T>>(i < length && position + i < kBits ? bit(position + i) : fill)
        << i;
  }
  return static_cast<T>(result);
}

template <class T>
void field(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  T result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    result[l] = extract(w.lanes<T>(i.in[0])[l], w.lanes<u32>(i.in[1])[l], w.lanes<u32>(i.in[2])[l]);
  }
  w.write(i.out[0], result, lanes);
}

template <class... Types>
void fields(Table& table) {
  (table.add(std::string("bfe.") + Types::name,
             [](Decoder& d) {
               using T = typename Types::type;
               d.out(0, sizeof(T)), d.in(1, sizeof(T)), d.in(2, 4), d.in(3, 4);
               d.made.run = field<T>;
             }),
   ...);
}

u32 insert(u32 a, u32 b, u32 position, u32 length) {
  position &= 255, length &= 255;
  const u64 ones = length >= 32 ? 0xFFFFFFFFull : (1ull << length) - 1;
  const u64 mask = position >= 32 ? 0 : ones << position;
  return static_cast<u32>((b & ~mask) |
                          (position >= 32 ? 0 : (static_cast<u64>(a) << position & mask)));
}

u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 s = selector >> (4 * i) & 15;
    u32 byte = static_cast<u32>(bytes >> (8 * (s & 7)) & 255);
    if (s & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

void lop3(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  u32 result[kLanes];
  const u32 *a = w.lanes<u32>(i.in[0]), *b = w.lanes<u32>(i.in[1]), *c = w.lanes<u32>(i.in[2]);
  for (int l = 0; l < kLanes; ++l) {
    result[l] = 0;
    for (int row = 0; row < 8; ++row) {
      if (i.number[0] >> row & 1) {
        result[l] |= (row & 4 ? a[l] : ~a[l]) & (row & 2 ? b[l] : ~b[l]) & (row & 1 ? c[l] : ~c[l]);
      }
    }
  }
  w.write(i.out[0], result, lanes);
}

}  // namespace

void add_arithmetic(Table& t) {
  const auto plus = [](auto a, auto b) { return a + b; };
  const auto minus = [](auto a, auto b) { return a - b; };
  const auto times = [](auto a, auto b) { return a * b; };
  const auto wrapped = [](auto a, auto b) { return static_cast<u64>(a) * static_cast<u64>(b); };
  const auto wrapped_plus = [](auto a, auto b) {
    return static_cast<u64>(a) + static_cast<u64>(b);
  };
  const auto wrapped_minus = [](auto a, auto b) {
    return static_cast<u64>(a) - static_cast<u64>(b);
  };
  // A NaN loses to a number.
  const auto least = [](auto a, auto b) { return b < a || a != a ? b : a; };
  const auto most = [](auto a, auto b) { return b > a || a != a ? b : a; };

  // Integers
  binary<U16, S16, U32, S32, U64, S64>(t, "add", wrapped_plus);
  binary<U16, S16, U32, S32, U64, S64>(t, "sub", wrapped_minus);
  binary<U16, S16, U32, S32, U64, S64>(t, "mul.lo", wrapped);
  binary<U32>(t, "mul.hi", [](u32 a, u32 b) { return static_cast<u64>(a) * b >> 32; });
  binary<S32>(t, "mul.hi", [](s32 a, s32 b) { return static_cast<s64>(a) * b >> 32; });
  binary<U64>(t, "mul.hi",
              [](u64 a, u64 b) { return static_cast<unsigned __int128>(a) * b >> 64; });
  ternary<U16, S16, U32, S32, U64, S64>(t, "mad.lo", [](auto a, auto b, auto c) {
    return static_cast<u64>(a) * static_cast<u64>(b) + static_cast<u64>(c);
  });
  wides<U16, u32>(t);
  wides<S16, s32>(t);
  wides<U32, u64>(t);
  wides<S32, s64>(t);
  binary<U16, S16, U32, S32, U64, S64>(t, "div", [](auto a, auto b) {
    using T = decltype(a);
    if (b == 0) return static_cast<T>(~T{0});
    if (std::is_signed_v<T> && b == static_cast<T>(-1))
      return static_cast<T>(0 - static_cast<u64>(a));
    return static_cast<T>(a / b);
  });
  binary<U16, S16, U32, S32, U64, S64>(t, "rem", [](auto a, auto b) {
    using T = decltype(a);
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return T{0};
    return static_cast<T>(a % b);
  });
  binary<U16, S16, U32, S32, U64, S64>(t, "min", least);
  binary<U16, S16, U32, S32, U64, S64>(t, "max", most);
  unary<S16, S32, S64>(
      t, "abs", [](auto a) { return a < 0 ? 0 - static_cast<u64>(a) : static_cast<u64>(a); });
  unary<S16, S32, S64>(t, "neg", [](auto a) { return 0 - static_cast<u64>(a); });

  // Bits
  binary<B16, B32, B64>(t, "and", [](auto a, auto b) { return a & b; });
  binary<B16, B32, B64>(t, "or", [](auto a, auto b) { return a | b; });
  binary<B16, B32, B64>(t, "xor", [](auto a, auto b) { return a ^ b; });
  unary<B16, B32, B64>(t, "not", [](auto a) { return ~a; });
  shifts<true, B16, B32, B64>(t, "shl");
  shifts<false, B16, B32, B64, U16, U32, U64, S16, S32, S64>(t, "shr");
  ternary<B32>(t, "shf.l.wrap", [](u32 a, u32 b, u32 c) {
    return (static_cast<u64>(b) << 32 | a) << (c & 31) >> 32;
  });
  ternary<B32>(t, "shf.r.wrap",
               [](u32 a, u32 b, u32 c) { return (static_cast<u64>(b) << 32 | a) >> (c & 31); });
  ternary<B32>(t, "shf.l.clamp", [](u32 a, u32 b, u32 c) {
    return c >= 32 ? a : static_cast<u32>((static_cast<u64>(b) << 32 | a) << c >> 32);
  });
  ternary<B32>(t, "shf.r.clamp", [](u32 a, u32 b, u32 c) {
    return (static_cast<u64>(b) << 32 | a) >> std::min(c, 32u);
  });
  fields<U32, S32, U64, S64>(t);
  t.add("bfi.b32", [](Decoder& d) {
    d.out(0, 4);
    for (int i = 1; i <= 4; ++i) d.in(i, 4);
    d.made.run =
        run<u32, u32, decltype([](u32 a, u32 b, u32 c, u32 e) { return insert(a, b, c, e); }), 4>;
  });
  ternary<B32>(t, "prmt", [](u32 a, u32 b, u32 c) { return permute(a, b, c); });
  unary<B32>(t, "popc", [](u32 a) { return __builtin_popcount(a); });
  unary<B32>(t, "clz", [](u32 a) { return a == 0 ? 32 : __builtin_clz(a); });
  unary<B32>(t, "brev", [](u32 a) {
    u32 result = 0;
    for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
    return result;
  });
  t.add("lop3.b32", [](Decoder& d) {
    d.out(0, 4);
    for (int i = 1; i <= 3; ++i) d.in(i, 4);
    d.made.number = {d.immediate(4)};
    d.made.run = lop3;
  });

  // Floating point. PTX leaves the last bits of the approximate ones open.
  for (const char* rounding : {"", ".rn"}) {
    binary<F32, F64>(t, std::string("add") + rounding, plus);
    binary<F32, F64>(t, std::string("sub") + rounding, minus);
    binary<F32, F64>(t, std::string("mul") + rounding, times);
  }
  ternary<F32, F64>(t, "fma.rn", [](auto a, auto b, auto c) { return std::fma(a, b, c); });
  for (const char* how : {"div.rn", "div.full", "div.approx"}) {
    binary<F32>(t, how, [](float a, float b) { return a / b; });
  }
  for (const char* how : {"rcp.rn", "rcp.approx", "rcp.approx.ftz"})
    unary<F32>(t, how, [](float a) { return 1 / a; });
  for (const char* how : {"sqrt.rn", "sqrt.approx"})
    unary<F32>(t, how, [](float a) { return std::sqrt(a); });
  for (const char* how : {"ex2.approx", "ex2.approx.ftz"})
    unary<F32>(t, how, [](float a) { return std::exp2(a); });
  unary<F32, F64>(t, "abs", [](auto a) { return std::fabs(a); });
  unary<F32, F64>(t, "neg", [](auto a) { return -a; });
  binary<F32, F64>(t, "min", least);
  binary<F32, F64>(t, "max", most);

  // Predicates
  comparisons<B16, B32, B64, U16, S16, U32, S32, U64, S64, F32, F64>(t);
  selections<B16, B32, B64, U16, S16, U32, S32, U64, S64, F32, F64>(t);
  on_predicates(t, "and.pred", 2, [](Mask a, Mask b) { return a & b; });
  on_predicates(t, "or.pred", 2, [](Mask a, Mask b) { return a | b; });
  on_predicates(t, "xor.pred", 2, [](Mask a, Mask b) { return a ^ b; });
  on_predicates(t, "not.pred", 1, [](Mask a, Mask) { return ~a; });
  on_predicates(t, "mov.pred", 1, [](Mask a, Mask) { return a; });
}

}  // namespace ptx
