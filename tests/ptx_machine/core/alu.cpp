// Arithmetic, one line an opcode: its name without the type, the types, and what it computes.
//
// To add one, add its line; to add a type to one, name it there.
#include <algorithm>
#include <cmath>

#include "lanewise.h"

namespace ptx {
namespace {

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

// Of 16-bit numbers. A float has more than twice their digits: that it rounds first does not show.
template <class T>
T sum(T a, T b) {
  return T::of(float{a} + float{b});
}

// a * b + c of 16-bit numbers, rounded once: the product is a float, and a sum that is none becomes
// the odd one of its two neighbours, which the rounding to fewer digits takes for what it stands
// for.
template <class T>
T fused(T a, T b, T c) {
  const float product = float{a} * float{b}, added = float{c}, sum = product + added;
  const float most = sum - product, rest = (product - (sum - most)) + (added - most);
  u32 raw = bits<u32>(sum);
  if ((rest > 0 || rest < 0) && raw % 2 == 0) raw += (rest > 0) == (sum > 0) ? 1 : -1;
  return T::of(bits<float>(raw));
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

  // Floating point. PTX leaves the last bits of the approximate ones open.
  for (const char* rounding : {"", ".rn"}) {
    binary<F32, F64>(t, std::string("add") + rounding, plus);
    binary<F32, F64>(t, std::string("sub") + rounding, minus);
    binary<F32, F64>(t, std::string("mul") + rounding, times);
  }
  binary<F16, BF16>(t, "add", [](auto a, auto b) { return sum(a, b); });
  binary<F16X2, BF16X2>(
      t, "add", [](auto a, auto b) { return decltype(a){sum(a.low, b.low), sum(a.high, b.high)}; });
  ternary<F16, BF16>(t, "fma.rn", [](auto a, auto b, auto c) { return fused(a, b, c); });
  ternary<F16X2, BF16X2>(t, "fma.rn", [](auto a, auto b, auto c) {
    return decltype(a){fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)};
  });
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
}

}  // namespace ptx
