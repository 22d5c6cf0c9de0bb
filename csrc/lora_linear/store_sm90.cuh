// How results leave: rounded once, through panels in shared memory, by TMA; and how P and Q are
// announced to other CTAs.
#pragma once

#include "../common/pipeline.h"
#include "../common/schedule.h"

namespace lora {

// This warpgroup's panels for stores: two, so that one is filled while the other is being read.
struct Store {
  uint32_t panels;
  int next = 0;

  LORA_DEVICE explicit Store(const Pipeline& pipeline)
      : panels(pipeline.base + kStoreOffset + consumer() * kStorePanels * kPanelBytes) {}

  LORA_DEVICE static bool leads() { return consumer_thread() == 0; }

  // Rounds 64 x kN accumulators once to T and stores them at (row, column) of the tensor,
  // transposed at (column, row) if kTransposed. Returns before the store is done.
  template <class T, bool kTransposed, int kCount>
  LORA_DEVICE void run(const float (&acc)[kCount], const TensorMap* map, int row, int column) {
    static_assert(!kTransposed || kCount == 32, "64 rows and columns");
#pragma unroll
    for (int chunk = 0; chunk < 2 * kCount / kRowElements<T>; ++chunk) {
      const uint32_t panel = panels + next * kPanelBytes;
      next ^= 1;
      if (leads()) ptx::tma_store_wait_read<1>();
      ptx::warpgroup_sync(own_barrier());
      if constexpr (std::is_same_v<T, float>) {
        write_fp32<kTransposed>(acc, chunk, panel);
      } else {
        write_panel<T, kTransposed>(acc, chunk, panel);
      }
      ptx::fence_proxy_async_shared();
      ptx::warpgroup_sync(own_barrier());
      if (leads()) {
        const int at = chunk * kRowElements<T>;
        ptx::tma_store(map, panel, (kTransposed ? row : column) + at, kTransposed ? column : row);
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

  // A panel takes 32 of the columns, or of the rows if transposed, which two of the warps hold.
  template <bool kTransposed, int kCount>
  LORA_DEVICE static void write_fp32(const float (&acc)[kCount], int chunk, uint32_t panel) {
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

}  // namespace lora
