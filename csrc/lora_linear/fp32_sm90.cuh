// fp32 adapters beside 16-bit x: how what a stage holds of them becomes operands of wgmma.
//
// Where only the right operand is fp32 (P, Q, db, da) it is split into a high and a low half and
// multiplied twice, so that nothing of it is lost. Where both are (the rank loop of main and dx
// tiles) they are rounded, as if they had been stored so.
#pragma once

#include <cmath>

#include "../common/pipeline.h"

namespace lora {

// The right operand's 64 x 64 box of fp32 fills two panels; the next two take its halves.
constexpr int kHighPanel = 2;

// What rounding to `bits` left over; nothing where it went to infinity, so that it stays infinite.
template <class Element>
LORA_DEVICE float remainder(float value, uint32_t bits) {
  const float rounded = ptx::unpack<Element>(static_cast<uint16_t>(bits));
  return fabsf(rounded) == INFINITY ? 0.0f : value - rounded;
}

template <class Element>
LORA_DEVICE void split(const float (&values)[4], uint32_t (&high)[4], uint32_t (&low)[4], int at) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float first = values[2 * i], second = values[2 * i + 1];
    const uint32_t rounded = ptx::pack<Element>(first, second);
    high[at + i] = rounded;
    low[at + i] = ptx::pack<Element>(remainder<Element>(first, rounded & 0xFFFF),
                                     remainder<Element>(second, rounded >> 16));
  }
}

// Splits the box at `right`, by all consumers together. A thread takes eight elements of a row at a
// time, from the left half of the box in even rows while from the right one in odd rows: so neither
// its loads nor its stores meet another's in a bank.
template <class Element>
LORA_DEVICE void split_right(uint32_t right) {
  const int thread = ptx::thread_index() - 128, row = thread / 4, part = thread % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int half = i ^ (row & 1);
    const uint32_t source = right + half * kPanelBytes;
    float first[4], second[4];
    uint32_t high[4], low[4];
    ptx::load_shared(chunk_address(source, row, 2 * part), first);
    ptx::load_shared(chunk_address(source, row, 2 * part + 1), second);
    split<Element>(first, high, low, 0);
    split<Element>(second, high, low, 2);
    const uint32_t target = chunk_address(right + kHighPanel * kPanelBytes, row, 4 * half + part);
    ptx::store_shared(target, high);
    ptx::store_shared(target + kPanelBytes, low);
  }
  ptx::fence_proxy_async_shared();
  ptx::consumers_sync(kConsumersBarrier);
}

// Rounds a panel in place, by one warpgroup: 64 rows of 32, or, with the contraction along the
// rows, two boxes of 32 x 32 side by side. A row is read and written by lanes of one warp alone.
template <class Element, Major kMajor>
LORA_DEVICE void round_panel(uint32_t panel) {
  constexpr int kBoxRows = 32;
  const int row = consumer_thread() / 4, part = consumer_thread() % 4;
  uint32_t rounded[2][4], targets[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int half = kMajor == Major::kK ? 0 : i ^ (row & 1);
    const int own_row = kMajor == Major::kK ? row + kBoxRows * i : row;
    const uint32_t source = panel + half * kBoxRows * kRowBytes;
    targets[i] = chunk_address(panel, own_row, 4 * half + part);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float values[4];
      ptx::load_shared(chunk_address(source, own_row, 2 * part + j), values);
      rounded[i][2 * j] = ptx::pack<Element>(values[0], values[1]);
      rounded[i][2 * j + 1] = ptx::pack<Element>(values[2], values[3]);
    }
  }
  ptx::warp_sync();
#pragma unroll
  for (int i = 0; i < 2; ++i) ptx::store_shared(targets[i], rounded[i]);
}

// Rounds both operands of a stage: each warpgroup its own rows of the left one and half of the
// panels of the right one, which both will read.
template <class Element, Major kMajorB>
LORA_DEVICE void round_both(const Pipeline& pipeline) {
  round_panel<Element, Major::kK>(pipeline.left() + consumer() * kPanelBytes);
#pragma unroll
  for (int i = 0; i < kPanelsB / 2; ++i) {
    const int panel = consumer() * kPanelsB / 2 + i;
    round_panel<Element, kMajorB>(pipeline.right() + panel * kPanelBytes);
  }
  ptx::fence_proxy_async_shared();
  ptx::consumers_sync(kConsumersBarrier);
}

}  // namespace lora
