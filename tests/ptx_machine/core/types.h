// Integers, the 16-bit floating-point formats, and PTX's names for types.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr int kLanes = 32;
using Mask = u32;  // of lanes
constexpr Mask kAll = ~Mask{0};

// What ends a launch: the program did something that has no meaning, or nothing moves any more.
struct Failure : std::runtime_error {
  using runtime_error::runtime_error;
};

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

struct Half {
  u16 raw;
  operator float() const { return static_cast<float>(bits<_Float16>(raw)); }
  static Half of(float value) { return {bits<u16>(static_cast<_Float16>(value))}; }
};

struct Bfloat {
  u16 raw;
  operator float() const { return bits<float>(u32{raw} << 16); }
  static Bfloat of(float value) {  // to the nearest, ties to even
    const u32 b = bits<u32>(value);
    if ((b & 0x7FFFFFFF) > 0x7F800000) return {0x7FFF};
    return {static_cast<u16>((b + 0x7FFF + (b >> 16 & 1)) >> 16)};
  }
};

template <class T>
struct Two {
  T low, high;
};

// A type as PTX writes it, and what holds its values here.
#define PTX_TYPE(Name, text, held)            \
  struct Name {                               \
    using type = held;                        \
    static constexpr const char* name = text; \
  };
PTX_TYPE(B8, "b8", u8)
PTX_TYPE(B16, "b16", u16)
PTX_TYPE(B32, "b32", u32)
PTX_TYPE(B64, "b64", u64)
PTX_TYPE(U8, "u8", u8)
PTX_TYPE(U16, "u16", u16)
PTX_TYPE(U32, "u32", u32)
PTX_TYPE(U64, "u64", u64)
PTX_TYPE(S8, "s8", s8)
PTX_TYPE(S16, "s16", s16)
PTX_TYPE(S32, "s32", s32)
PTX_TYPE(S64, "s64", s64)
PTX_TYPE(F16, "f16", Half)
PTX_TYPE(BF16, "bf16", Bfloat)
PTX_TYPE(F16X2, "f16x2", Two<Half>)
PTX_TYPE(BF16X2, "bf16x2", Two<Bfloat>)
PTX_TYPE(F32, "f32", float)
PTX_TYPE(F64, "f64", double)
#undef PTX_TYPE

// Bytes of a type by its name; 0 for what is no type.
inline int type_bytes(const std::string& name) {
  if (name == "f16x2" || name == "bf16x2" || name == "tf32") return 4;
  if (name == "bf16") return 2;
  if (name.size() < 2 || std::string("bsuf").find(name[0]) == std::string::npos) return 0;
  const std::string size = name.substr(1);
  return size == "8" ? 1 : size == "16" ? 2 : size == "32" ? 4 : size == "64" ? 8 : 0;
}

}  // namespace ptx
