// cvt, mov and cvta.
#include <cmath>
#include <limits>

#include "machine.h"

namespace ptx {
namespace {

enum Rounding { kNone, kNearest, kZero, kNearestAway, kToInteger, kToIntegerZero };

// A value on its way between types: numbers of every kind fit one of the two.
template <class From>
auto widen(From value) {
  if constexpr (std::is_integral_v<From>) {
    return value;
  } else if constexpr (std::is_same_v<From, double>) {
    return value;
  } else {
    return static_cast<float>(value);
  }
}

template <class To, Rounding kRounding, class Value>
To narrow(Value value) {
  if constexpr (std::is_same_v<To, Half> || std::is_same_v<To, Bfloat>) {
    return To::of(static_cast<float>(value));
  } else if constexpr (std::is_floating_point_v<To> && std::is_floating_point_v<Value> &&
                       kRounding >= kToInteger) {
    return static_cast<To>(kRounding == kToIntegerZero ? std::trunc(value) : std::nearbyint(value));
  } else if constexpr (std::is_floating_point_v<Value> && std::is_integral_v<To>) {
    if (std::isnan(value)) return 0;
    const double whole =
        kRounding == kToIntegerZero ? std::trunc(double{value}) : std::nearbyint(double{value});
    if (whole <= static_cast<double>(std::numeric_limits<To>::min()))
      return std::numeric_limits<To>::min();
    if (whole >= static_cast<double>(std::numeric_limits<To>::max()))
      return std::numeric_limits<To>::max();
    return static_cast<To>(whole);
  } else {
    return static_cast<To>(value);
  }
}

template <class To, class From, Rounding kRounding>
void convert(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  const Slot out = i.out[0], in = i.in[0];
  if (out.bytes == sizeof(To) && in.bytes == sizeof(From)) {
    To result[kLanes];
    const From* from = w.lanes<From>(in);
    for (int l = 0; l < kLanes; ++l) result[l] = narrow<To, kRounding>(widen(from[l]));
    w.write(out, result, lanes);
    return;
  }
  for (int l = 0; l < kLanes; ++l) {  // registers wider than the types
    if (!(lanes >> l & 1)) continue;
    const u64 bits = w.value(in, l);
    From from;
    std::memcpy(&from, &bits, sizeof(From));
    const To to = narrow<To, kRounding>(widen(from));
    u64 wide = 0;
    if constexpr (std::is_integral_v<To>) {
      wide = static_cast<u64>(static_cast<s64>(to));
      if constexpr (std::is_unsigned_v<To>) wide = to;
    } else {
      std::memcpy(&wide, &to, sizeof(To));
    }
    w.set(out, l, wide);
  }
}

template <class... Types>
struct List {};
using Integers = List<U8, S8, U16, S16, U32, S32, U64, S64>;
using Floats = List<F16, BF16, F32, F64>;

// Sets the handler where the two names are those of a type in each list.
template <Rounding kRounding, class... To, class... From>
void choose(Decoder& d, const std::string& to, const std::string& from, List<To...>,
            List<From...>) {
  const auto with = [&]<class T>(T) {
    ((to == T::name && from == From::name &&
      (d.made.run = convert<typename T::type, typename From::type, kRounding>, true)) ||
     ...);
  };
  (with(To{}), ...);
}

// Packs two floats into one register; the first operand lands in the high half.
template <class T>
void pack_halves(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  u32 result[kLanes];
  const float *high = w.lanes<float>(i.in[0]), *low = w.lanes<float>(i.in[1]);
  for (int l = 0; l < kLanes; ++l) {
    result[l] = u32{T::of(high[l]).raw} << 16 | T::of(low[l]).raw;
  }
  w.write(i.out[0], result, lanes);
}

template <bool kAway>
void to_tf32(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  u32 result[kLanes];
  const u32* from = w.lanes<u32>(i.in[0]);
  for (int l = 0; l < kLanes; ++l) {
    u32 b = from[l];
    if ((b & 0x7F800000) != 0x7F800000) b += kAway ? 0x1000 : 0x0FFF + (b >> 13 & 1);
    result[l] = b & ~0x1FFFu;
  }
  w.write(i.out[0], result, lanes);
}

void decode_convert(Decoder& d) {
  const int rounding = d.modifiers.take_any({"rn", "rz", "rna", "rni", "rzi"}, -1);
  const std::string from = d.modifiers.take_type(), to = d.modifiers.take_type();
  if (to == "bf16x2" || to == "f16x2") {
    if (rounding != 0 || from != "f32") throw Failure("it is packed by .rn from .f32 alone");
    d.out(0, 4), d.in(1, 4), d.in(2, 4);
    d.made.run = to == "bf16x2" ? pack_halves<Bfloat> : pack_halves<Half>;
    return;
  }
  if (to == "tf32") {
    d.out(0, 4), d.in(1, 4);
    d.made.run = rounding == 2 ? to_tf32<true> : to_tf32<false>;
    return;
  }
  d.out_wider(0, type_bytes(to)), d.in_wider(1, type_bytes(from));
  if (rounding == -1) choose<kNone>(d, to, from, Integers(), Integers());
  if (rounding == -1 || rounding == 0) choose<kNearest>(d, to, from, Floats(), Floats());
  if (rounding == 0) choose<kNearest>(d, to, from, Floats(), Integers());
  if (rounding == 3) {
    choose<kToInteger>(d, to, from, Integers(), Floats());
    choose<kToInteger>(d, to, from, List<F32, F64>(), List<F32, F64>());
  }
  if (rounding == 4) {
    choose<kToIntegerZero>(d, to, from, Integers(), Floats());
    choose<kToIntegerZero>(d, to, from, List<F32, F64>(), List<F32, F64>());
  }
  if (d.made.run == nullptr) throw Failure("a conversion that is not modelled");
}

// --- mov
// ------------------------------------------------------------------------------------------------

template <class T>
void move(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  T values[kLanes];
  std::memcpy(values, w.lanes<T>(i.in[0]), sizeof(values));
  w.write(i.out[0], values, lanes);
}

void pack(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    u64 value = 0;
    for (size_t part = i.in.size(); part-- > 0;)
      value = value << (8 * i.in[part].bytes) | w.value(i.in[part], l);
    w.set(i.out[0], l, value);
  }
}

void unpack(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  const u32 bytes = static_cast<u32>(i.number[0]);
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    const u64 value = w.value(i.in[0], l);
    for (size_t part = 0; part < i.out.size(); ++part) {
      if (i.out[part].bytes != 0) w.set(i.out[part], l, value >> (8 * bytes * part));
    }
  }
}

void decode_move(Decoder& d) {
  const int bytes = type_bytes(d.modifiers.take_type());
  if (d.parts(0) > 1) {
    const int each = bytes / d.parts(0);
    for (int part = 0; part < d.parts(0); ++part) d.out(0, each, part);
    d.in(1, bytes);
    d.made.number = {each};
    d.made.run = unpack;
    return;
  }
  d.out(0, bytes);
  for (int part = 0; part < d.parts(1); ++part) d.in(1, bytes / d.parts(1), part);
  if (d.parts(1) > 1)
    d.made.run = pack;
  else if (bytes == 2)
    d.made.run = move<u16>;
  else if (bytes == 4)
    d.made.run = move<u32>;
  else if (bytes == 8)
    d.made.run = move<u64>;
  else
    throw Failure("a move of a size that is not modelled");
}

void parameter_address(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  u64 result[kLanes];
  const u64* from = w.lanes<u64>(i.in[0]);
  for (int l = 0; l < kLanes; ++l) result[l] = from[l] + reinterpret_cast<u64>(m.parameters());
  w.write(i.out[0], result, lanes);
}

// Shared memory is a window of the generic addresses; one in it keeps its CTA's rank.
void shared_to_generic(Machine&, Warp& w, const Instruction& i, Mask lanes) {
  u64 result[kLanes];
  const u64* from = w.lanes<u64>(i.in[0]);
  for (int l = 0; l < kLanes; ++l) result[l] = from[l] + kSharedWindow;
  w.write(i.out[0], result, lanes);
}

void generic_to_shared(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  u64 result[kLanes];
  const u64* from = w.lanes<u64>(i.in[0]);
  for (int l = 0; l < kLanes; ++l) {
    result[l] = from[l] - kSharedWindow;
    if ((lanes >> l & 1) && result[l] >> 32 != 0)
      m.fail(w, "a generic address outside of shared memory");
  }
  w.write(i.out[0], result, lanes);
}

}  // namespace

void add_conversions(Table& table) {
  table.family("cvt", decode_convert);
  table.family("mov", decode_move);
  // A generic address is that of the machine's own memory.
  for (const char* name : {"cvta.to.global.u64", "cvta.global.u64"}) {
    table.add(name, [](Decoder& d) {
      d.out(0, 8), d.in(1, 8);
      d.made.run = move<u64>;
    });
  }
  for (const std::string space : {"shared", "shared::cta", "shared::cluster"}) {
    table.add("cvta." + space + ".u64", [](Decoder& d) {
      d.out(0, 8), d.in(1, 8);
      d.made.run = shared_to_generic;
    });
    table.add("cvta.to." + space + ".u64", [](Decoder& d) {
      d.out(0, 8), d.in(1, 8);
      d.made.run = generic_to_shared;
    });
  }
  table.add("cvta.param.u64", [](Decoder& d) {
    d.out(0, 8), d.in(1, 8);
    d.made.run = parameter_address;
  });
}

}  // namespace ptx
