// How results leave: rounded once, through panels in shared memory, by TMA; and how P and Q are
// announced to other CTAs.
//
// A main or dx tile is held in registers, rounded, until the next one is being multiplied: its
// panels go out behind those products. Nobody waits for y or dx, so nobody waits for what is held.
#pragma once

#include "../common/pipeline.h"
#include "../common/schedule.h"

namespace lora {

constexpr int kTilePanels = kPanelsB;                   // of a warpgroup's rows of a tile
constexpr int kPanelPairs = kPanel * kPanel / 2 / 128;  // of 16-bit elements, in each thread

// Where main or dx tiles go to, and whether they are added to what is there.
struct Tiles {
  const TensorMap* map;
  bool adds;
};

// This warpgroup's panels for stores: two, so that one is filled while the other is being read.
struct Store {
  uint32_t panels;
  Tiles tiles;
  int next = 0;
  uint32_t held[kTilePanels * kPanelPairs];
  int held_row = -1, held_column = 0;  // a row below 0 says that nothing has been held yet

  LORA_DEVICE Store(const Pipeline& pipeline, const Tiles& tiles)
      : panels(pipeline.base + kStoreOffset + consumer() * kStorePanels * kPanelBytes),
        tiles(tiles) {}

  LORA_DEVICE static bool leads() { return consumer_thread() == 0; }

  // Rounds 64 x 64 accumulators once to T and stores them at (row, column) of the tensor,
  // transposed at (column, row) if kTransposed. Returns before the store is done.
  template <class T, bool kTransposed>
  LORA_DEVICE void run(const float (&acc)[kPanel / 2], const TensorMap* map, int row, int column) {
#pragma unroll
    for (int chunk = 0; chunk < kPanel / kRowElements<T>; ++chunk) {
      const int at = chunk * kRowElements<T>;
      const int inner = (kTransposed ? row : column) + at, outer = kTransposed ? column : row;
      send({map, false}, inner, outer, [&](uint32_t panel) {
        if constexpr (std::is_same_v<T, float>) {
          write_fp32<kTransposed>(acc, chunk, panel);
        } else {
          uint32_t pairs[kPanelPairs];
          round<T>(acc, pairs);
          write_panel<kTransposed>(pairs, panel);
        }
      });
    }
  }

  // Rounds 64 x 256 accumulators of a tile once to Element and holds them, for (row, column). What
  // was held before must be out: put(0, kTilePanels) comes between, once.
  template <class Element>
  LORA_DEVICE void hold(const float (&acc)[2 * kTilePanels * kPanelPairs], int row, int column) {
    round<Element>(acc, held);
    held_row = row;
    held_column = column;
  }

  // Stores the panels `begin` to `end` of the tile that is held, if any is. Both must be constants,
  // for registers have no addresses. Returns before the stores are done.
  LORA_DEVICE void put(int begin, int end) {
    if (held_row < 0) return;
#pragma unroll
    for (int i = begin; i < end; ++i) {
      send(tiles, held_column + i * kPanel, held_row,
           [&](uint32_t panel) { write_panel<false>(held + i * kPanelPairs, panel); });
    }
  }

  // Stores, or adds, at (inner, outer) what `write` leaves in the next panel.
  template <class Write>
  LORA_DEVICE void send(const Tiles& to, int inner, int outer, const Write& write) {
    const uint32_t panel = panels + next * kPanelBytes;
    next ^= 1;
    if (leads()) ptx::tma_store_wait_read<1>();
    ptx::warpgroup_sync(own_barrier());
    write(panel);
    ptx::fence_proxy_async_shared();
    ptx::warpgroup_sync(own_barrier());
    if (leads()) {
      if (to.adds) {
        ptx::tma_add(to.map, panel, inner, outer);
      } else {
        ptx::tma_store(to.map, panel, inner, outer);
      }
      ptx::tma_store_commit();
    }
  }

  template <class Element, int kPairs>
  LORA_DEVICE static void round(const float (&acc)[2 * kPairs], uint32_t (&pairs)[kPairs]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pairs[i] = ptx::pack<Element>(acc[2 * i], acc[2 * i + 1]);
  }

  // Each stmatrix writes two 8-column blocks of the warp's 16 rows (wgmma.h has the fragment).
  template <bool kTransposed>
  LORA_DEVICE static void write_panel(const uint32_t* pairs, uint32_t panel) {
    const int lane = consumer_thread() % 32, warp = consumer_thread() / 32;
    const int matrix = lane / 8, half = matrix % 2;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint32_t blocks[4] = {pairs[2 * j], pairs[2 * j + 1], pairs[2 * j + 2],
                                  pairs[2 * j + 3]};
      const int block = j + matrix / 2;
      ptx::store_matrix<kTransposed>(
          kTransposed ? chunk_address(panel, 8 * block + lane % 8, 2 * warp + half)
                      : chunk_address(panel, 16 * warp + 8 * half + lane % 8, block),
          blocks);
    }
  }

  // A panel takes 32 of the columns, or of the rows if transposed, which two of the warps hold.
  template <bool kTransposed>
  LORA_DEVICE static void write_fp32(const float (&acc)[kPanel / 2], int chunk, uint32_t panel) {
    const int lane = consumer_thread() % 32, warp = consumer_thread() / 32;
    if (kTransposed && warp / 2 != chunk) return;
#pragma unroll
    for (int j = 0; j < (kTransposed ? 8 : 4); ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kTransposed) {
          const int row = 8 * j + 2 * (lane % 4), column = 16 * (warp % 2) + lane / 4 + 8 * half;
          const int at = 4 * j + 2 * half, inside = 4 * (column % 4);
          ptx::store_shared(chunk_address(panel, row, column / 4) + inside, acc[at]);
          ptx::store_shared(chunk_address(panel, row + 1, column / 4) + inside, acc[at + 1]);
        } else {
          const int row = 16 * warp + lane / 4 + 8 * half, at = 16 * chunk + 4 * j + 2 * half;
          const uint32_t target = chunk_address(panel, row, 2 * j + lane % 4 / 2);
          ptx::store_shared(target + 8 * (lane % 2), acc[at], acc[at + 1]);
        }
      }
    }
  }

  // Announces to other CTAs what this warpgroup has stored so far: to those who wait for this block
  // of rows and, where there are any, to those who wait for all of them.
  template <bool kAll>
  LORA_DEVICE static void publish(uint32_t* workspace, int row_block) {
    if (leads()) {
      ptx::tma_store_wait_written();
      ptx::fence_acq_rel_gpu();
      ptx::add_relaxed(workspace + kReady + row_block, 1);
      if constexpr (kAll) ptx::add_relaxed(workspace + kAllReady, 1);
    }
  }

  // Shared memory must outlive the stores that read it.
  LORA_DEVICE static void drain() {
    if (leads()) ptx::tma_store_wait_written();
  }
};

// What goes out behind the first stages of a contraction, a panel each: nothing, or what is held
// from the panel kFirst on.
struct NoPanels {
  static constexpr int kCount = 0;
};

template <int kFirst>
struct HeldPanels {
  static constexpr int kCount = kTilePanels - kFirst;
  Store& store;

  LORA_DEVICE void put(int begin, int end) { store.put(kFirst + begin, kFirst + end); }
};

}  // namespace lora
