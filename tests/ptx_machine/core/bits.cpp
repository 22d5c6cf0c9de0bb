// Shifts, logic, and fields of bits.
#include <algorithm>
#include <type_traits>

#include "lanewise.h"

namespace ptx {
namespace {

// --- Shifts: the count is a u32 whatever is shifted ---

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

// --- Bit fields ---

template <class T>
using Unsigned = std::make_unsigned_t<T>;

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

void add_bits(Table& t) {
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
}

}  // namespace ptx
