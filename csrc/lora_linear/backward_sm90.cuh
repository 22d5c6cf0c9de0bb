// The backward kernel: Q and db items, then dx tiles, then da items, in one launch.
#pragma once

#include "../common/launch.h"
#include "lora_linear.h"
#include "tile_sm90.cuh"

namespace lora {

struct BackwardParameters {
  TensorMap dy, x, w, a, b, p, q, dx, da, db;
  uint32_t* workspace;
  int ctas;  // of a cluster, which takes as many blocks of 128 at a time
  int m, n, k, r;
  bool need_dx, need_da, need_db;
  Scale scale;
  Dropout dropout;

  LORA_HOST_DEVICE int groups(int size) const { return blocks(size, ctas * kTileM); }
  LORA_HOST_DEVICE int column_blocks() const { return blocks(k, kTileN); }
  LORA_HOST_DEVICE int rank_tiles() const { return blocks(r, kRankTile); }
  LORA_HOST_DEVICE int q_end() const { return need_dx || need_da ? groups(m) * rank_tiles() : 0; }
  LORA_HOST_DEVICE int db_end() const { return q_end() + (need_db ? groups(n) * rank_tiles() : 0); }
  LORA_HOST_DEVICE int dx_end() const {
    return db_end() + (need_dx ? groups(m) * column_blocks() : 0);
  }
  LORA_HOST_DEVICE int end() const { return dx_end() + (need_da ? groups(k) * rank_tiles() : 0); }

  // The part of the CTA `cta` of a cluster in an item: block of 128 and rank tile of the `item`-th
  // Q, db or da item, row block and column block of a dx tile.
  LORA_HOST_DEVICE Tile skinny(int item, int cta) const {
    return {item / rank_tiles() * ctas + cta, item % rank_tiles()};
  }
  LORA_HOST_DEVICE Tile dx_tile(int ticket, int cta) const {
    const auto [group, column] =
        grouped_tile(ticket - db_end(), groups(m), column_blocks(), kGroup / ctas);
    return {group * ctas + cta, column};
  }
};

template <class Element, class Adapter>
LORA_DEVICE void produce(const BackwardParameters& f, Pipeline& pipeline, int ticket) {
  constexpr Major kK = Major::kK, kMn = Major::kMn;
  const int cta = pipeline.rank;
  if (ticket < f.q_end()) {
    const auto [row, rank] = f.skinny(ticket, cta);
    load<Element, Adapter, kRankTile, kK, kMn>(pipeline, {&f.dy, row * kTileM},
                                               {&f.b, rank * kRankTile}, f.n);
  } else if (ticket < f.db_end()) {
    const auto [block, rank] = f.skinny(ticket - f.q_end(), cta);
    load<Element, Adapter, kRankTile, kMn, kMn>(pipeline, {&f.dy, block * kTileM},
                                                {&f.p, rank * kRankTile}, f.m);
  } else if (ticket < f.dx_end()) {
    const auto [row, column] = f.dx_tile(ticket, cta);
    const auto frozen = [&, row = row, column = column] {
      load<Element, Element, kTileN, kK, kMn>(pipeline, {&f.dy, row * kTileM},
                                              {&f.w, column * kTileN}, f.n);
    };
    if (!f.dropout.enabled) frozen();
    await_flag(f.workspace + kReady + row, kConsumerWarpgroups * f.rank_tiles());
    load<Adapter, Adapter, kTileN, kK, kMn>(pipeline, {&f.q, row * kTileM}, {&f.a, column * kTileN},
                                            f.r);
    if (f.dropout.enabled) frozen();
  } else {
    const auto [block, rank] = f.skinny(ticket - f.dx_end(), cta);
    await_flag(f.workspace + kAllReady, kConsumerWarpgroups * f.ctas * f.q_end());
    load<Element, Adapter, kRankTile, kMn, kMn>(pipeline, {&f.x, block * kTileM},
                                                {&f.q, rank * kRankTile}, f.m);
  }
}

// Q[128, 64] = m * dy * B, and the flag of its rows. B is read as it lies: R is contiguous.
template <class Element, class Adapter>
LORA_DEVICE void q_item(const BackwardParameters& f, Pipeline& pipeline, Store& store, Tile item) {
  float acc[kRankTile / 2];
  fill_zero(acc);
  contract<Element, Element, Adapter, kRankTile, Major::kK, Major::kMn>(acc, pipeline, f.n,
                                                                        NoMask{});
  multiply(acc, f.scale.factor);
  store.run<Adapter, false>(acc, &f.q, item.row * kTileM + consumer() * kPanel,
                            item.column * kRankTile);
  Store::publish(f.workspace, item.row);
}

// db[128, 64] = 2^e * dy^T * P, summed over M in order.
template <class Element, class Adapter>
LORA_DEVICE void db_item(const BackwardParameters& f, Pipeline& pipeline, Store& store, Tile item) {
  float acc[kRankTile / 2];
  fill_zero(acc);
  contract<Element, Element, Adapter, kRankTile, Major::kMn, Major::kMn>(acc, pipeline, f.m,
                                                                         NoMask{});
  multiply(acc, f.scale.raise);
  store.run<Adapter, false>(acc, &f.db, item.row * kTileM + consumer() * kPanel,
                            item.column * kRankTile);
}

// da[64, 128] = 2^e * Q^T * keep(x), computed as its transpose so that x is the wide operand.
template <class Element, class Adapter>
LORA_DEVICE void da_item(const BackwardParameters& f, const Dropout& dropout, Pipeline& pipeline,
                         Store& store, Tile item) {
  const int column = item.row * kTileM + consumer() * kPanel;
  float acc[kRankTile / 2];
  fill_zero(acc);
  if (dropout.enabled) {
    contract<Element, Element, Adapter, kRankTile, Major::kMn, Major::kMn>(
        acc, pipeline, f.m, PanelMask{dropout, 0, column, kPanel, 0});
  } else {
    contract<Element, Element, Adapter, kRankTile, Major::kMn, Major::kMn>(acc, pipeline, f.m,
                                                                           NoMask{});
  }
  multiply(acc, f.scale.raise);
  store.run<Adapter, true>(acc, &f.da, column, item.column * kRankTile);
}

// Zeroes the accumulators of dx that dropout drops. The four lanes that hold a row's group of eight
// columns hold two of them each; each lane draws every fourth group and they exchange.
LORA_DEVICE void mask_accumulators(float (&acc)[kTileN / 2], const Dropout& dropout, int row,
                                   int column) {
  const int thread = consumer_thread(), lane = thread % 4;
  row += 16 * (thread / 32) + thread % 32 / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int block = 0; block < kTileN / 8; block += 4) {
      const uint32_t drawn = keep_bits(dropout, row + 8 * half, column / 8 + block + lane);
#pragma unroll
      for (int source = 0; source < 4; ++source) {
        const uint32_t bits = ptx::shuffle_quad(drawn, source) >> (2 * lane);
        const int at = 4 * (block + source) + 2 * half;
        if ((bits & 1) == 0) acc[at] = 0.0f;
        if ((bits & 2) == 0) acc[at + 1] = 0.0f;
      }
    }
  }
}

// dx[128, 256] = dy*W + 2^e*keep(Q*A). Dropout masks Q*A alone, so it must come first then.
template <class Element, class Adapter>
LORA_DEVICE void dx_tile(const BackwardParameters& f, const Dropout& dropout, Pipeline& pipeline,
                         Store& store, Tile tile) {
  const int row = tile.row * kTileM + consumer() * kPanel, column = tile.column * kTileN;
  float acc[kTileN / 2];
  fill_zero(acc);
  const auto frozen = [&] {
    contract<Element, Element, Element, kTileN, Major::kK, Major::kMn>(acc, pipeline, f.n,
                                                                       NoMask{});
  };
  const auto low_rank = [&] {
    contract<Element, Adapter, Adapter, kTileN, Major::kK, Major::kMn>(acc, pipeline, f.r,
                                                                       NoMask{});
  };
  if (dropout.enabled) {
    low_rank();
    mask_accumulators(acc, dropout, row, column);
    multiply(acc, f.scale.raise);
    frozen();
  } else {
    frozen();
    add_scaled(acc, f.scale, low_rank);
  }
  store.run<Element, false>(acc, &f.dx, row, column);
}

template <class Element, class Adapter>
LORA_KERNEL(kThreads)
lora_linear_backward(const LORA_PARAMETER BackwardParameters f) {
  run_items(
      f.ctas, f.workspace, kReady + f.groups(f.m) * f.ctas, f.end(),
      [&](Pipeline& pipeline, int ticket) { produce<Element, Adapter>(f, pipeline, ticket); },
      [&](Pipeline& pipeline, Store& store, int ticket) {
        const int cta = pipeline.rank;
        if (ticket < f.q_end()) {
          q_item<Element, Adapter>(f, pipeline, store, f.skinny(ticket, cta));
        } else if (ticket < f.db_end()) {
          db_item<Element, Adapter>(f, pipeline, store, f.skinny(ticket - f.q_end(), cta));
        } else if (ticket < f.dx_end()) {
          dx_tile<Element, Adapter>(f, with_seed(f.dropout), pipeline, store,
                                    f.dx_tile(ticket, cta));
        } else {
          da_item<Element, Adapter>(f, with_seed(f.dropout), pipeline, store,
                                    f.skinny(ticket - f.dx_end(), cta));
        }
      });
}

template <class Element, class Adapter>
Failure backward(const BackwardArguments& arguments, cudaStream_t stream) {
  const BackwardArguments& f = arguments;
  TensorMaps maps;
  const BackwardParameters parameters{maps.of<Element>(f.dy, f.m, f.n),
                                      maps.of<Element>(f.x, f.m, f.k),
                                      maps.of<Element>(f.w, f.n, f.k),
                                      maps.of<Adapter>(f.a, f.r, f.k, kDepth<Adapter>),
                                      maps.of<Adapter>(f.b, f.n, f.r),
                                      maps.of<Adapter>(f.p, f.m, f.r),
                                      maps.of<Adapter>(f.q, f.m, f.r),
                                      maps.of<Element>(f.dx, f.m, f.k),
                                      maps.of<Adapter>(f.da, f.r, f.k),
                                      maps.of<Adapter>(f.db, f.n, f.r),
                                      reinterpret_cast<uint32_t*>(f.workspace),
                                      cluster_ctas(f.m),
                                      f.m,
                                      f.n,
                                      f.k,
                                      f.r,
                                      f.need_dx,
                                      f.need_da,
                                      f.need_db,
                                      f.scale,
                                      f.dropout};
  if (!maps.failure.empty()) return maps.failure;
  return launch<lora_linear_backward<Element, Adapter>>(parameters, parameters.end(),
                                                        parameters.ctas, maps.sms, stream);
}

}  // namespace lora
