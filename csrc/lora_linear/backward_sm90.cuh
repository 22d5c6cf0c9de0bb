// The backward kernel: Q and db items, then dx tiles, then da items, in one launch.
#pragma once

#include "../common/launch.h"
#include "lora_linear.h"
#include "tile_sm90.cuh"

namespace lora {

enum class Kind { kQ, kDb, kDx, kDa };

struct Item {
  Kind kind;
  int row, column;  // block of 128 rows, and rank tile or block of 256 columns
};

struct BackwardParameters {
  // dy in boxes of 128 rows for Q and dx, of 64 for db, which contracts over the rows.
  TensorMap dy, dy_deep, x, w, a, b, p, q, dx, da, db;
  uint32_t* workspace;
  bool adds_dx;  // to the dx that is there, instead of replacing it
  int ctas;      // of a cluster, which takes as many blocks of 128 at a time
  int words, m, n, r;
  SkinnyGrid q_items, db_items, da_items;
  TileGrid dx_tiles;
  int da_begin;  // the first ticket of the da items: dx tiles come before it and may come after
                 // them
  Scale scale;
  Dropout dropout;

  LORA_HOST_DEVICE int dx_begin() const { return q_items.count + db_items.count; }
  LORA_HOST_DEVICE int end() const { return dx_begin() + dx_tiles.count + da_items.count; }

  // What the CTA `cta` of a cluster does of the item behind a ticket.
  LORA_DEVICE Item item(int ticket, int cta) const {
    const auto part = [&](Kind kind, Tile tile) {
      return Item{kind, tile.row * ctas + cta, tile.column};
    };
    if (ticket < q_items.count) return part(Kind::kQ, q_items(ticket));
    if (ticket < dx_begin()) return part(Kind::kDb, db_items(ticket - q_items.count));
    if (ticket < da_begin) return part(Kind::kDx, dx_tiles(ticket - dx_begin()));
    const int da_item = ticket - da_begin;
    if (da_item < da_items.count) return part(Kind::kDa, da_items(da_item));
    return part(Kind::kDx, dx_tiles(ticket - da_items.count - dx_begin()));
  }
};

template <class Element, class Adapter>
LORA_DEVICE void produce(const BackwardParameters& f, Pipeline& pipeline, int ticket) {
  constexpr Major kK = Major::kK, kMn = Major::kMn;
  const Item item = f.item(ticket, pipeline.rank);
  const int row = item.row * kTileM, rank = item.column * kRankTile;
  if (item.kind == Kind::kQ) {
    load<Element, Adapter, kRankTile, kK, kMn>(pipeline, {&f.dy, row}, {&f.b, rank}, f.n);
  } else if (item.kind == Kind::kDb) {
    load<Element, Adapter, kRankTile, kMn, kMn>(pipeline, {&f.dy_deep, row}, {&f.p, rank}, f.m);
  } else if (item.kind == Kind::kDx) {
    const int column = item.column * kTileN;
    const auto frozen = [&] {
      load<Element, Element, kTileN, kK, kMn>(pipeline, {&f.dy, row}, {&f.w, column}, f.n);
    };
    if (!f.dropout.enabled) frozen();
    await_flag(f.workspace + kReady + item.row, kConsumerWarpgroups * f.q_items.rank_tiles.value);
    load<Adapter, Adapter, kTileN, kK, kMn, kPanel>(pipeline, {&f.q, row}, {&f.a, column}, f.r);
    if (f.dropout.enabled) frozen();
  } else {
    await_flag(f.workspace + kAllReady, kConsumerWarpgroups * f.ctas * f.q_items.count);
    load<Element, Adapter, kRankTile, kMn, kMn>(pipeline, {&f.x, row}, {&f.q, rank}, f.m);
  }
}

// Q[128, 64] = m * dy * B, and the flag of its rows. B is read as it lies: R is contiguous.
template <class Element, class Adapter>
LORA_DEVICE void q_item(const BackwardParameters& f, Pipeline& pipeline, Store& store,
                        const Item& item) {
  float acc[kRankTile / 2];
  fill_zero(acc);
  contract<Element, Element, Adapter, kRankTile, Major::kK, Major::kMn>(acc, pipeline, f.n,
                                                                        NoMask{});
  multiply(acc, f.scale.factor);
  store.run<Adapter, false>(acc, &f.q, item.row * kTileM + consumer() * kPanel,
                            item.column * kRankTile);
  Store::publish<true>(f.workspace, item.row);
}

// db[128, 64] = 2^e * dy^T * P, summed over M in order.
template <class Element, class Adapter>
LORA_DEVICE void db_item(const BackwardParameters& f, Pipeline& pipeline, Store& store,
                         const Item& item) {
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
                         Store& store, const Item& item) {
  const int column = item.row * kTileM + consumer() * kPanel;
  float acc[kRankTile / 2];
  fill_zero(acc);
  if (dropout.enabled) {
    contract<Element, Element, Adapter, kRankTile, Major::kMn, Major::kMn>(
        acc, pipeline, f.m, PanelMask{dropout, 0, dropout.first_group + column / 8, kPanel, 0});
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
  const uint32_t group = dropout.first_group + column / 8 + lane;
#pragma unroll
  for (int block = 0; block < kTileN / 8; block += 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t drawn = keep_bits(dropout, row + 8 * half, group + block);
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

// dx[128, 256] = dy*W + 2^e*keep(Q*A). Dropout masks Q*A alone, so it must come first then; of the
// tile that is held, half goes out ahead: drawing the mask takes its registers.
template <class Element, class Adapter>
LORA_DEVICE void dx_tile(const BackwardParameters& f, const Dropout& dropout, Pipeline& pipeline,
                         Store& store, const Item& tile) {
  constexpr int kAhead = kTilePanels / 2;
  const int row = tile.row * kTileM + consumer() * kPanel, column = tile.column * kTileN;
  float acc[kTileN / 2];
  fill_zero(acc);
  const auto frozen = [&](auto panels) {
    contract<Element, Element, Element, kTileN, Major::kK, Major::kMn>(acc, pipeline, f.n, NoMask{},
                                                                       panels);
  };
  const auto low_rank = [&] {
    contract<Element, Adapter, Adapter, kTileN, Major::kK, Major::kMn>(acc, pipeline, f.r,
                                                                       NoMask{});
  };
  if (dropout.enabled) {
    store.put(0, kAhead);
    low_rank();
    mask_accumulators(acc, dropout, row, column);
    multiply(acc, f.scale.raise);
    frozen(HeldPanels<kAhead>{store});
  } else {
    frozen(HeldPanels<0>{store});
    add_scaled(acc, f.scale, low_rank);
  }
  store.hold<Element>(acc, row, column);
}

template <class Element, class Adapter>
__global__ void __launch_bounds__(kThreads, 1)
    lora_linear_backward(const __grid_constant__ BackwardParameters f) {
  run_items<Adapter>(
      f.ctas, {&f.dx, f.adds_dx}, f.workspace, f.words, f.end(),
      [&](Pipeline& pipeline, int ticket) { produce<Element, Adapter>(f, pipeline, ticket); },
      [&](Pipeline& pipeline, Store& store, int ticket) {
        const Item item = f.item(ticket, pipeline.rank);
        if (item.kind == Kind::kQ) {
          q_item<Element, Adapter>(f, pipeline, store, item);
        } else if (item.kind == Kind::kDb) {
          db_item<Element, Adapter>(f, pipeline, store, item);
        } else if (item.kind == Kind::kDx) {
          dx_tile<Element, Adapter>(f, with_seed(f.dropout), pipeline, store, item);
        } else {
          da_item<Element, Adapter>(f, with_seed(f.dropout), pipeline, store, item);
        }
      });
}

// Returns how many dx tiles come after the da items. Where a da item takes longer than a dx tile it
// would be the last to end, so it begins earlier by its own length, in whole waves of tiles.
//
// Clocks as README.md derives them: 64 bytes arrive a clock, drawing the mask of a stage takes
// 1000, a stage of a tile 1024 and a slice of its rank loop 256, what surrounds an item 2400, and a
// tile, whose store the next one hides, 1000.
template <class Adapter>
int tiles_after_da(const BackwardArguments& f, int tiles, int at_once) {
  constexpr int kAround = 2400, kAroundTile = 1000;
  constexpr int kStage = Boxes<Bf16, Major::kMn, kTileM, kPanel>::kBytes +
                         Boxes<Adapter, Major::kMn, kRankTile, kPanel>::kBytes;
  const int64_t da = int64_t{blocks(f.m, kPanel)} * (f.dropout.enabled ? 1000 : kStage / 64);
  const int64_t dx = int64_t{blocks(f.n, kPanel)} * 1024 + blocks(f.r, kWgmmaK) * 256;
  if (da <= dx) return 0;
  const int64_t waves = (da + kAround) / (dx + kAroundTile) + 1;
  return static_cast<int>(std::min<int64_t>(tiles, waves * at_once));
}

template <class Element, class Adapter>
Failure backward(const BackwardArguments& arguments, cudaStream_t stream) {
  const BackwardArguments& f = arguments;
  TensorMaps maps;
  const int ctas = cluster_ctas(f.m), rank_tiles = blocks(f.r, kRankTile);
  const auto groups = [&](int size, bool needed) {
    return needed ? blocks(size, ctas * kTileM) : 0;
  };
  BackwardParameters parameters{maps.of<Element>(f.dy, f.m, f.n, kTileM),
                                maps.of<Element>(f.dy, f.m, f.n),
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
                                f.adds_dx,
                                ctas,
                                kReady + groups(f.m, true) * ctas,
                                f.m,
                                f.n,
                                f.r,
                                {groups(f.m, f.need_dx || f.need_da), rank_tiles},
                                {groups(f.n, f.need_db), rank_tiles},
                                {groups(f.k, f.need_da), rank_tiles},
                                {groups(f.m, f.need_dx), blocks(f.k, kTileN), kGroup / ctas},
                                0,
                                f.scale,
                                f.dropout};
  if (!maps.failure.empty()) return maps.failure;
  const int tiles = parameters.dx_tiles.count;
  parameters.da_begin =
      parameters.dx_begin() + tiles - tiles_after_da<Adapter>(f, tiles, maps.sms / ctas);
  return launch<lora_linear_backward<Element, Adapter>>(parameters, parameters.end(),
                                                        parameters.ctas, maps.sms, stream);
}

}  // namespace lora
