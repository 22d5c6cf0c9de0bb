// The forward kernel: P items, then main tiles, in one launch.
#pragma once

#include "../common/launch.h"
#include "lora_linear.h"
#include "tile_sm90.cuh"

namespace lora {

struct ForwardParameters {
  TensorMap x, w, a, b, y, p;  // x in boxes of 128 rows
  const uint32_t* bias;        // pairs
  uint32_t* workspace;
  int ctas;  // of a cluster, which takes as many blocks of rows at a time
  int words, n, k, r;
  SkinnyGrid p_items;
  TileGrid tiles;
  Scale scale;
  Dropout dropout;

  LORA_HOST_DEVICE int end() const { return p_items.count + tiles.count; }

  // The part of the CTA `cta` of a cluster in an item: row block and rank tile of a P item, row
  // block and column block of a main tile.
  LORA_DEVICE Tile p_item(int ticket, int cta) const {
    const auto [group, rank] = p_items(ticket);
    return {group * ctas + cta, rank};
  }
  LORA_DEVICE Tile main_tile(int ticket, int cta) const {
    const auto [group, column] = tiles(ticket - p_items.count);
    return {group * ctas + cta, column};
  }
};

template <class Element, class Adapter>
LORA_DEVICE void produce(const ForwardParameters& f, Pipeline& pipeline, int ticket) {
  if (ticket < f.p_items.count) {
    const auto [row, rank] = f.p_item(ticket, pipeline.rank);
    load<Element, Adapter, kRankTile, Major::kK, Major::kK>(pipeline, {&f.x, row * kTileM},
                                                            {&f.a, rank * kRankTile}, f.k);
    return;
  }
  const auto [row, column] = f.main_tile(ticket, pipeline.rank);
  load<Element, Element, kTileN, Major::kK, Major::kK>(pipeline, {&f.x, row * kTileM},
                                                       {&f.w, column * kTileN}, f.k);
  await_flag(f.workspace + kReady + row, kConsumerWarpgroups * f.p_items.rank_tiles.value);
  load<Adapter, Adapter, kTileN, Major::kK, Major::kK, kPanel>(pipeline, {&f.p, row * kTileM},
                                                               {&f.b, column * kTileN}, f.r);
}

// P[128, 64] = m * keep(x) * A^T, and the flag of its rows.
template <class Element, class Adapter>
LORA_DEVICE void p_item(const ForwardParameters& f, const Dropout& dropout, Pipeline& pipeline,
                        Store& store, int ticket) {
  const auto [row_block, rank] = f.p_item(ticket, pipeline.rank);
  const int row = row_block * kTileM + consumer() * kPanel;
  float acc[kRankTile / 2];
  fill_zero(acc);
  if (dropout.enabled) {
    contract<Element, Element, Adapter, kRankTile, Major::kK, Major::kK>(
        acc, pipeline, f.k, PanelMask{dropout, row, dropout.first_group, 0, kPanel / 8});
  } else {
    contract<Element, Element, Adapter, kRankTile, Major::kK, Major::kK>(acc, pipeline, f.k,
                                                                         NoMask{});
  }
  multiply(acc, f.scale.factor);
  store.run<Adapter, false>(acc, &f.p, row, rank * kRankTile);
  Store::publish<false>(f.workspace, row_block);
}

// N is a multiple of 8, so the elements of a pair are in or out together.
template <class Element>
LORA_DEVICE void add_bias(float (&acc)[kTileN / 2], const uint32_t* pairs, int column, int n) {
  column += 2 * (consumer_thread() % 4);
#pragma unroll
  for (int block = 0; block < kTileN / 8; ++block, column += 8) {
    if (column < n) {
      const uint32_t pair = pairs[column / 2];
      const float low = ptx::unpack<Element>(static_cast<uint16_t>(pair));
      const float high = ptx::unpack<Element>(static_cast<uint16_t>(pair >> 16));
      acc[4 * block] += low;
      acc[4 * block + 1] += high;
      acc[4 * block + 2] += low;
      acc[4 * block + 3] += high;
    }
  }
}

// y[128, 256] = x*W^T + 2^e*(P*B^T) (+ bias): P and B come through the same ring into the same sum.
template <class Element, class Adapter>
LORA_DEVICE void main_tile(const ForwardParameters& f, Pipeline& pipeline, Store& store,
                           int ticket) {
  const auto [row, column] = f.main_tile(ticket, pipeline.rank);
  float acc[kTileN / 2];
  fill_zero(acc);
  contract<Element, Element, Element, kTileN, Major::kK, Major::kK>(acc, pipeline, f.k, NoMask{},
                                                                    HeldPanels<0>{store});
  add_scaled(acc, f.scale, [&] {
    contract<Element, Adapter, Adapter, kTileN, Major::kK, Major::kK>(acc, pipeline, f.r, NoMask{});
  });
  if (f.bias != nullptr) add_bias<Element>(acc, f.bias, column * kTileN, f.n);
  store.hold<Element>(acc, row * kTileM + consumer() * kPanel, column * kTileN);
}

template <class Element, class Adapter>
__global__ void __launch_bounds__(kThreads, 1)
    lora_linear_forward(const __grid_constant__ ForwardParameters f) {
  run_items<Adapter>(
      f.ctas, {&f.y, false}, f.workspace, f.words, f.end(),
      [&](Pipeline& pipeline, int ticket) { produce<Element, Adapter>(f, pipeline, ticket); },
      [&](Pipeline& pipeline, Store& store, int ticket) {
        if (ticket < f.p_items.count) {
          p_item<Element, Adapter>(f, with_seed(f.dropout), pipeline, store, ticket);
        } else {
          main_tile<Element, Adapter>(f, pipeline, store, ticket);
        }
      });
}

template <class Element, class Adapter>
Failure forward(const ForwardArguments& arguments, cudaStream_t stream) {
  const auto [m, n, k, r, x, w, a, b, y, p, bias, workspace, scale, dropout] = arguments;
  TensorMaps maps;
  const int ctas = cluster_ctas(m), row_groups = blocks(m, ctas * kTileM);
  const ForwardParameters parameters{maps.of<Element>(x, m, k, kTileM),
                                     maps.of<Element>(w, n, k),
                                     maps.of<Adapter>(a, r, k),
                                     maps.of<Adapter>(b, n, r),
                                     maps.of<Element>(y, m, n),
                                     maps.of<Adapter>(p, m, r),
                                     reinterpret_cast<const uint32_t*>(bias),
                                     reinterpret_cast<uint32_t*>(workspace),
                                     ctas,
                                     kReady + row_groups * ctas,
                                     n,
                                     k,
                                     r,
                                     {row_groups, blocks(r, kRankTile)},
                                     {row_groups, blocks(n, kTileN), kGroup / ctas},
                                     scale,
                                     dropout};
  if (!maps.failure.empty()) return maps.failure;
  return launch<lora_linear_forward<Element, Adapter>>(parameters, parameters.end(),
                                                       parameters.ctas, maps.sms, stream);
}

}  // namespace lora
