// The dropout mask, bit for bit that of lora_kernels/ops/lora_linear/philox.py.
//
// Philox 4x32-10 (Salmon et al., SC'11) at counter (k div 8, m) gives eight 16-bit numbers, one for
// each of eight consecutive elements of a row of x; an element stays where its number is at least
// the threshold.
#pragma once

#include "ptx.h"

namespace lora {

LORA_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((uint64_t{a} * b) >> 32);
}

// Writes the numbers of elements 8*group to 8*group+7 of `row`: the h-th is the low (h even) or
// high half of word h/2, as the elements lie in memory.
LORA_DEVICE void random_words(const Dropout& dropout, uint32_t row, uint32_t group,
                              uint32_t (&words)[4]) {
  uint32_t c0 = group, c1 = row, c2 = 0, c3 = 0;
  uint32_t key0 = dropout.key_low, key1 = dropout.key_high;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = multiply_high(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ key0;
    c2 = high0 ^ c3 ^ key1;
    c1 = low1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Writes the keep mask of eight elements over their words: all ones where one is kept.
LORA_DEVICE void keep_masks(const Dropout& dropout, uint32_t row, uint32_t group,
                            uint32_t (&mask)[4]) {
  uint32_t words[4];
  random_words(dropout, row, group, words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mask[i] = ((words[i] & 0xFFFFu) >= dropout.threshold ? 0x0000FFFFu : 0u) |
              ((words[i] >> 16) >= dropout.threshold ? 0xFFFF0000u : 0u);
  }
}

// The same in eight bits: bit h is set where the h-th element is kept.
LORA_DEVICE uint32_t keep_bits(const Dropout& dropout, uint32_t row, uint32_t group) {
  uint32_t words[4], bits = 0;
  random_words(dropout, row, group, words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if ((words[i] & 0xFFFFu) >= dropout.threshold) bits |= 1u << (2 * i);
    if ((words[i] >> 16) >= dropout.threshold) bits |= 2u << (2 * i);
  }
  return bits;
}

}  // namespace lora
