// What every work item is made of: a 128 x N tile of L*R^T, contracted through the ring; the flags
// that carry P and Q from one CTA to another; and the loop that works off the items.
#pragma once

#include "../common/philox.h"
#include "../common/schedule.h"
#include "../common/wgmma.h"
#include "fp32_sm90.cuh"
#include "store_sm90.cuh"

namespace lora {

constexpr int kTileM = 128;    // rows of a tile: 64 for each consumer warpgroup
constexpr int kTileN = 256;    // columns of a main or dx tile
constexpr int kRankTile = 64;  // columns of a P, Q, db or da item
constexpr int kGroup = 16;     // row blocks that share the L2 cache

// Contraction per stage: a row of a panel of the left operand.
template <class Left>
constexpr int kDepth = kRowElements<Left>;

// --- Producer ------------------------------------------------------------------------------------

// One side of a contraction: its tensor, and where the tile starts along M or N.
struct Operand {
  const TensorMap* map;
  int start;
};

template <class Boxes>
LORA_DEVICE void load_box(const Pipeline& pipeline, uint32_t boxes, int i, const Operand& operand,
                          int depth, bool shared) {
  const uint32_t target = boxes + i * Boxes::kBoxBytes, full = pipeline.stages.full();
  const int inner = Boxes::inner(i, operand.start, depth);
  const int outer = Boxes::outer(i, operand.start, depth);
  if (shared) {
    ptx::tma_load_multicast(target, operand.map, full, inner, outer, (1 << pipeline.ctas) - 1);
  } else {
    ptx::tma_load(target, operand.map, full, inner, outer);
  }
}

// Streams both operands of a tile, contracted over `depth`, through the ring. The CTAs of a cluster
// take turns at the boxes of the right operand. A box may come from another CTA before this one
// expects it; the phase still ends only after this CTA's arrival.
template <class Left, class Right, int kN, Major kMajorA, Major kMajorB, int kRowsA = kTileM>
LORA_DEVICE void load(Pipeline& pipeline, const Operand& a, const Operand& b, int depth) {
  using BoxesA = Boxes<Left, kMajorA, kTileM, kDepth<Left>, kRowsA>;
  using BoxesB = Boxes<Right, kMajorB, kN, kDepth<Left>>;
  static_assert(BoxesA::kBytes <= kPanelsA * kPanelBytes &&
                BoxesB::kBytes <= kPanelsB * kPanelBytes);
#pragma unroll 1
  for (int k = 0; k < depth; k += kDepth<Left>) {
    pipeline.await_empty();
    ptx::barrier_arrive_expecting(pipeline.stages.full(), BoxesA::kBytes + BoxesB::kBytes);
#pragma unroll
    for (int i = 0; i < BoxesA::kCount; ++i) {
      load_box<BoxesA>(pipeline, pipeline.left(), i, a, k, false);
    }
#pragma unroll
    for (int i = 0; i < BoxesB::kCount; ++i) {
      if (pipeline.ctas == 1) {
        load_box<BoxesB>(pipeline, pipeline.right(), i, b, k, false);
      } else if (i % 2 == pipeline.rank) {
        load_box<BoxesB>(pipeline, pipeline.right(), i, b, k, true);
      }
    }
    pipeline.stages.advance();
  }
}

// Returns once `target` arrivals are counted at `flag`, and what they announce can be read by TMA.
// The spin itself is relaxed: an acquire would invalidate the L1 cache on every turn.
LORA_DEVICE void await_flag(const uint32_t* flag, uint32_t target) {
  while (ptx::load_relaxed(flag) < target) {
  }
  ptx::fence_acq_rel_gpu();
  ptx::fence_proxy_async_global();
}

// --- Consumers -----------------------------------------------------------------------------------

struct NoMask {
  static constexpr bool kActive = false;
};

// Zeroes what dropout drops from this warpgroup's panel of x: rows of x from `row`, elements of it
// from the eight columns `group` of its mask. Each step of the contraction moves on by `row_step`
// and `group_step`.
struct PanelMask {
  static constexpr bool kActive = true;
  const Dropout& dropout;
  int row;
  uint32_t group;
  int row_step, group_step;

  LORA_DEVICE void apply(uint32_t panel) {
    const int chunk = consumer_thread() % 8;
#pragma unroll
    for (int i = consumer_thread() / 8; i < kPanel; i += 16) {
      uint32_t values[4], mask[4];
      const uint32_t address = chunk_address(panel, i, chunk);
      keep_masks(dropout, row + i, group + chunk, mask);
      ptx::load_shared(address, values);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] &= mask[j];
      ptx::store_shared(address, values);
    }
    ptx::fence_proxy_async_shared();
    ptx::warpgroup_sync(own_barrier());
    row += row_step;
    group += group_step;
  }
};

// acc += L*R^T of this warpgroup's 64 rows, contracted over `depth` in the next stages of the ring.
// Operands are stored as Left and Right and multiplied as Element: fp32 on the right alone is split
// in two products, fp32 on both sides is rounded.
//
// One stage's multiplications stay in flight: it is released a step later, and only the last step
// is waited for. What a stage holds beyond the depth is zero by TMA's fill. Panels that are held go
// out while products are in flight or, where there are too few stages, ahead of them.
template <class Element, class Left, class Right, int kN, Major kMajorA, Major kMajorB, class Mask,
          class Panels = NoPanels>
LORA_DEVICE void contract(float (&acc)[kN / 2], Pipeline& pipeline, int depth, Mask mask,
                          Panels panels = {}) {
  using Multiply = ptx::Wgmma<Element, kN, kMajorA == Major::kMn, kMajorB == Major::kMn>;
  constexpr bool kRounded = std::is_same_v<Left, float>;
  constexpr bool kSplit = !kRounded && std::is_same_v<Right, float>;
  constexpr bool kRewrites = kRounded || kSplit;
  const auto await = [&] {
    pipeline.stages.await_full();
    if constexpr (Mask::kActive) mask.apply(pipeline.left() + consumer() * kPanelBytes);
    if constexpr (kSplit) split_right<Element>(pipeline.right());
    if constexpr (kRounded) round_both<Element, kMajorB>(pipeline);
  };
  const auto slice = [&](int i) {
    const uint64_t a = descriptor<kMajorA>(pipeline.left() + consumer() * kPanelBytes, i);
    const uint32_t b = pipeline.right() + (kSplit ? kHighPanel * kPanelBytes : 0);
    Multiply::run(acc, a, descriptor<kMajorB>(b, i));
    if constexpr (kSplit) Multiply::run(acc, a, descriptor<kMajorB>(b + kPanelBytes, i));
  };
  const int full_stages = depth / kDepth<Left>;
  const int last_slices = blocks(depth % kDepth<Left>, kWgmmaK);
  uint32_t previous = 0;
  const auto step = [&](const auto& meanwhile, bool is_first = false) {
    await();
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDepth<Left> / kWgmmaK; ++i) slice(i);
    ptx::wgmma_commit();
    meanwhile();
    if (!is_first) {
      ptx::wgmma_wait<1>();
      if (previous != 0) pipeline.release<kRewrites>(previous);
    }
    previous = pipeline.stages.empty();
    pipeline.stages.advance();
  };
  int stage = 0;
  if constexpr (Panels::kCount > 0) {
    // Else zeros would be written where the branches meet ahead of the loop, and ptxas serialise
    // wgmma (C7515).
    ptx::pin(acc);
    if (full_stages < Panels::kCount) {
      panels.put(0, Panels::kCount);
    } else {
#pragma unroll
      for (; stage < Panels::kCount; ++stage) {
        step([&] { panels.put(stage, stage + 1); }, stage == 0);
      }
    }
  }
#pragma unroll 1
  for (; stage < full_stages; ++stage) step([] {});
  ptx::wgmma_wait<0>();
  if (previous != 0) pipeline.release<kRewrites>(previous);
  if (last_slices != 0) {
    await();
#pragma unroll 1
    for (int i = 0; i < last_slices; ++i) {
      ptx::wgmma_fence();
      slice(i);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();  // a loop of unknown length must not carry one in flight
    }
    pipeline.release<kRewrites>(pipeline.stages.empty());
    pipeline.stages.advance();
  }
  ptx::pin(acc);
}

template <int kCount>
LORA_DEVICE void fill_zero(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) acc[i] = 0.0f;
}

template <int kCount>
LORA_DEVICE void multiply(float (&acc)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) acc[i] *= factor;
}

// acc += 2^e times what `low_rank` adds to it: acc is lowered by the power of two meanwhile,
// exactly. Where the power is 1 nothing is multiplied. There are two copies of `low_rank` because
// ptxas serialises wgmma (C7515) where accumulators from two branches meet ahead of it.
template <int kCount, class LowRank>
LORA_DEVICE void add_scaled(float (&acc)[kCount], const Scale& scale, const LowRank& low_rank) {
  if (scale.raise == 1.0f) {
    low_rank();
  } else {
    multiply(acc, scale.lower);
    low_rank();
    multiply(acc, scale.raise);
  }
}

// --- Kernel skeleton -----------------------------------------------------------------------------

LORA_DEVICE Dropout with_seed(Dropout dropout) {
  if (dropout.enabled && dropout.seed != nullptr) {
    dropout.key_low = ptx::load_relaxed(dropout.seed);
    dropout.key_high = ptx::load_relaxed(dropout.seed + 1);
  }
  return dropout;
}

// Runs `produce(pipeline, ticket)` in one thread and `consume(pipeline, store, ticket)` in the
// consumer warpgroups for each ticket below `end`; main or dx tiles go to `tiles`. The last CTA to
// finish zeroes the workspace.
template <class Adapter, class Produce, class Consume>
LORA_DEVICE void run_items(int ctas, const Tiles& tiles, uint32_t* workspace, int words,
                           uint32_t end, const Produce& produce, const Consume& consume) {
  Pipeline pipeline(ctas, std::is_same_v<Adapter, float>);
  if (ptx::thread_index() == 0) pipeline.init();
  ptx::warp_sync();
  ptx::cluster_sync();
  if (ptx::thread_index() < 128) {
    ptx::give_up_registers<kProducerRegisters>();
    if (ptx::thread_index() < 32 && ptx::elect()) {
      uint32_t ticket;
      do {
        if (pipeline.rank == 0) {
          ticket = ptx::fetch_add_relaxed(workspace + kTicket, 1);
          pipeline.put_ticket(ticket);
        } else {
          ticket = pipeline.get_ticket(false);
        }
        if (ticket < end) produce(pipeline, ticket);
      } while (ticket < end);
    }
  } else {
    ptx::claim_registers<kConsumerRegisters>();
    Store store(pipeline, tiles);
    for (;;) {
      const uint32_t ticket = pipeline.get_ticket(true);
      if (ticket >= end) break;
      consume(pipeline, store, ticket);
    }
    store.put(0, kTilePanels);
    Store::drain();
  }
  ptx::warp_sync();
  // Nobody in the cluster reaches into this CTA any more, every flag of the cluster is published
  // and its last ticket taken: once all CTAs have come here, nobody needs the workspace.
  ptx::cluster_sync();
  if (ptx::thread_index() == 0) {
    ptx::fence_acq_rel_gpu();
    if (ptx::fetch_add_relaxed(workspace + kFinished, 1) == ptx::block_count() - 1u) {
      ptx::fence_acq_rel_gpu();
      for (int i = 0; i < words; ++i) ptx::store_relaxed(workspace + i, 0);
    }
  }
}

// How many CTAs share a cluster: two where there are two blocks of rows to share the right operand.
LORA_HOST_DEVICE int cluster_ctas(int m) { return m > kTileM ? 2 : 1; }

}  // namespace lora
