// What both the host and the kernels speak of: element types, dropout, scaling and failure.
#pragma once

#include <cstdint>
#include <string>

namespace lora {

using Failure = std::string;  // why something on the host did not work; empty if it did

struct Bf16 {};
struct Fp16 {};

struct Dropout {
  bool enabled = false;
  uint32_t threshold = 0;  // an element stays where its 16-bit number is at least this
  uint32_t key_low = 0, key_high = 0;
  uint32_t first_group = 0;        // of eight columns: where the mask of x starts
  const uint32_t* seed = nullptr;  // two words in device memory that replace the key
};

// s, over 1-p under dropout, as factor * raise: raise = 2^e is exact, lower is 2^-e, |factor| <= 1.
// P and Q carry the factor alone, so that no scaling passes through a 16-bit number; the power of
// two multiplies fp32 sums.
struct Scale {
  float factor = 0, lower = 1, raise = 1;
};

}  // namespace lora
