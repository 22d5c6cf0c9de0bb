// What every work item is made of: a 128 x N tile of L*R^T, contracted through the ring, rounded
// once and stored by TMA; and the flags that carry P and Q from one CTA to another.
#pragma once

#include "../common/philox.h"
#include "../common/pipeline.h"
#include "../common/schedule.h"
#include "../common/wgmma.h"

namespace lora {

constexpr int kTileM = 128;    // rows of a tile: 64 for each consumer warpgroup
constexpr int kTileN = 256;    // columns of a main or dx tile
constexpr int kRankTile = 64;  // columns of a P, Q, db or da item
constexpr int kDepth = 64;     // contraction per stage
constexpr int kGroup = 16;     // row blocks that share the L2 cache

LORA_DEVICE int consumer() { return ptx::thread_index() / 128 - 1; }
LORA_DEVICE int consumer_thread() { return ptx::thread_index() % 128; }

// --- Producer ------------------------------------------------------------------------------------

// One side of a contraction: its tensor, and where the tile starts along M or N.
struct Operand {
  const TensorMap* map;
  int start;
};

template <Major kMajor>
LORA_DEVICE void load_panel(const Pipeline& pipeline, int panel, const Operand& operand, int offset,
                            int depth, bool shared) {
  const uint32_t target = pipeline.panels() + panel * kPanelBytes, full = pipeline.stages.full();
  const int start = operand.start + offset;
  const int inner = kMajor == Major::kK ? depth : start;
  const int outer = kMajor == Major::kK ? start : depth;
  if (shared) {
    ptx::tma_load_multicast(target, operand.map, full, inner, outer, (1 << pipeline.ctas) - 1);
  } else {
    ptx::tma_load(target, operand.map, full, inner, outer);
  }
}

// Streams both operands of a tile, contracted over `depth`, through the ring. The CTAs of a cluster
// take turns at the panels of the right operand. A panel may come from another CTA before this one
// expects it; the phase still ends only after this CTA's arrival.
template <int kN, Major kMajorA, Major kMajorB>
LORA_DEVICE void load(Pipeline& pipeline, const Operand& a, const Operand& b, int depth) {
  constexpr int kPanelsN = kN / kPanel;
#pragma unroll 1
  for (int k = 0; k < depth; k += kDepth) {
    pipeline.stages.await_empty();
    ptx::barrier_arrive_expecting(pipeline.stages.full(), (kPanelsA + kPanelsN) * kPanelBytes);
#pragma unroll
    for (int i = 0; i < kPanelsA; ++i) {
      load_panel<kMajorA>(pipeline, i, a, i * kPanel, k, false);
    }
#pragma unroll
    for (int i = 0; i < kPanelsN; ++i) {
      if (pipeline.ctas == 1) {
        load_panel<kMajorB>(pipeline, kPanelsA + i, b, i * kPanel, k, false);
      } else if (i % 2 == pipeline.rank) {
        load_panel<kMajorB>(pipeline, kPanelsA + i, b, i * kPanel, k, true);
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
// from `column`. Each step of the contraction moves on by `row_step` and `column_step`.
struct PanelMask {
  static constexpr bool kActive = true;
  const Dropout& dropout;
  int row, column, row_step, column_step;

  LORA_DEVICE void apply(uint32_t panel) {
    const int chunk = consumer_thread() % 8;
#pragma unroll
    for (int i = consumer_thread() / 8; i < kPanel; i += 16) {
      uint32_t values[4], mask[4];
      const uint32_t address = chunk_address(panel, i, chunk);
      keep_masks(dropout, row + i, column / 8 + chunk, mask);
      ptx::load_shared(address, values);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] &= mask[j];
      ptx::store_shared(address, values);
    }
    ptx::fence_proxy_async_shared();
    ptx::warpgroup_sync(1 + consumer());
    row += row_step;
    column += column_step;
  }
};

// The stages of a contraction: full ones, then one of which only the first `last_slices` slices of
// 16 count (0: there is none).
struct Extent {
  int full_stages, last_slices;

  LORA_DEVICE explicit Extent(int depth)
      : full_stages(depth / kDepth), last_slices(blocks(depth % kDepth, kWgmmaK)) {}
};

// acc += L*R^T of this warpgroup's 64 rows, over the next stages of the ring.
//
// One stage's multiplications stay in flight: it is released a step later, and only the last step
// is waited for. What a stage holds beyond the depth is zero by TMA's fill.
template <class Element, int kN, Major kMajorA, Major kMajorB, class Mask>
LORA_DEVICE void contract(float (&acc)[kN / 2], Pipeline& pipeline, Extent extent, Mask mask) {
  using Multiply = ptx::Wgmma<Element, kN, kMajorA == Major::kMn, kMajorB == Major::kMn>;
  const auto await = [&] {
    pipeline.stages.await_full();
    if constexpr (Mask::kActive) mask.apply(pipeline.panels() + consumer() * kPanelBytes);
  };
  const auto slice = [&](int i) {
    const uint32_t a = pipeline.panels() + consumer() * kPanelBytes;
    const uint32_t b = pipeline.panels() + kPanelsA * kPanelBytes;
    Multiply::run(acc, descriptor<kMajorA>(a, i), descriptor<kMajorB>(b, i));
  };
  uint32_t previous = 0;
#pragma unroll 1
  for (int stage = 0; stage < extent.full_stages; ++stage) {
    await();
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDepth / kWgmmaK; ++i) slice(i);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (previous != 0) pipeline.release(previous);
    previous = pipeline.stages.empty();
    pipeline.stages.advance();
  }
  ptx::wgmma_wait<0>();
  if (previous != 0) pipeline.release(previous);
  if (extent.last_slices != 0) {
    await();
#pragma unroll 1
    for (int i = 0; i < extent.last_slices; ++i) {
      ptx::wgmma_fence();
      slice(i);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();  // a loop of unknown length must not carry one in flight
    }
    pipeline.release(pipeline.stages.empty());
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

// This warpgroup's panels for stores: two, so that one is filled while the other is being read.
struct Store {
  uint32_t panels;
  int next = 0;

  LORA_DEVICE explicit Store(const Pipeline& pipeline)
      : panels(pipeline.base + kStoreOffset + consumer() * kStorePanels * kPanelBytes) {}

  LORA_DEVICE static bool leads() { return consumer_thread() == 0; }

  // Rounds 64 x kN accumulators once and stores them at (row, column) of the tensor, transposed at
  // (column, row) if kTransposed. Returns before the store is done.
  template <class Element, bool kTransposed, int kCount>
  LORA_DEVICE void run(const float (&acc)[kCount], const TensorMap* map, int row, int column) {
#pragma unroll
    for (int chunk = 0; chunk < kCount / 32; ++chunk) {
      const uint32_t panel = panels + next * kPanelBytes;
      next ^= 1;
      if (leads()) ptx::tma_store_wait_read<1>();
      ptx::warpgroup_sync(1 + consumer());
      write_panel<Element, kTransposed>(acc, chunk, panel);
      ptx::fence_proxy_async_shared();
      ptx::warpgroup_sync(1 + consumer());
      if (leads()) {
        const int at = column + chunk * kPanel;
        ptx::tma_store(map, panel, kTransposed ? row : at, kTransposed ? at : row);
        ptx::tma_store_commit();
      }
    }
  }

  // Each stmatrix writes two 8-column blocks of the warp's 16 rows (wgmma.h has the fragment).
  template <class Element, bool kTransposed, int kCount>
  LORA_DEVICE static void write_panel(const float (&acc)[kCount], int chunk, uint32_t panel) {
    const int lane = consumer_thread() % 32, warp = consumer_thread() / 32;
    const int matrix = lane / 8, half = matrix % 2;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 32 * chunk + 4 * j + 2 * i;
        packed[i] = ptx::pack<Element>(acc[at], acc[at + 1]);
      }
      const int block = j + matrix / 2;
      ptx::store_matrix<kTransposed>(
          kTransposed ? chunk_address(panel, 8 * block + lane % 8, 2 * warp + half)
                      : chunk_address(panel, 16 * warp + 8 * half + lane % 8, block),
          packed);
    }
  }

  // Announces to other CTAs what this warpgroup has stored so far.
  LORA_DEVICE static void publish(uint32_t* workspace, int row_block) {
    if (leads()) {
      ptx::tma_store_wait_written();
      ptx::fence_acq_rel_gpu();
      ptx::add_relaxed(workspace + kReady + row_block, 1);
      ptx::add_relaxed(workspace + kAllReady, 1);
    }
  }

  // Shared memory must outlive the stores that read it.
  LORA_DEVICE static void drain() {
    if (leads()) ptx::tma_store_wait_written();
  }
};

// --- Kernel skeleton -----------------------------------------------------------------------------

LORA_DEVICE Dropout with_seed(Dropout dropout) {
  if (dropout.enabled && dropout.seed != nullptr) {
    dropout.key_low = ptx::load_relaxed(dropout.seed);
    dropout.key_high = ptx::load_relaxed(dropout.seed + 1);
  }
  return dropout;
}

// Runs `produce(pipeline, ticket)` in one thread and `consume(pipeline, store, ticket)` in the
// consumer warpgroups for each ticket below `end`. The last CTA to finish zeroes the workspace.
template <class Produce, class Consume>
LORA_DEVICE void run_items(int ctas, uint32_t* workspace, int words, uint32_t end,
                           const Produce& produce, const Consume& consume) {
  Pipeline pipeline(ctas);
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
    Store store(pipeline);
    for (;;) {
      const uint32_t ticket = pipeline.get_ticket(true);
      if (ticket >= end) break;
      consume(pipeline, store, ticket);
    }
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
