// cp.async.bulk.tensor: boxes of tensors to shared memory, by one CTA for several, and back;
// cp.reduce.async.bulk.tensor: back, added to what is there.
#include "machine.h"

namespace ptx {
namespace {

const TensorMap& map_at(Machine& m, const Warp& w, u64 address) {
  if (address % 64 != 0) m.fail(w, "a misaligned tensor map");
  const auto& map = *reinterpret_cast<const TensorMap*>(address);
  if (map.magic != TensorMap::kMagic) m.fail(w, "no tensor map at the address");
  return map;
}

// The swizzle mixes address bits 7 to 9 into bits 4 to 6, of the absolute address.
u32 swizzled(u32 address, int swizzle) {
  static constexpr u32 kMixed[] = {0, 0x10, 0x30, 0x70};
  return address ^ (address >> 3 & kMixed[swizzle]);
}

u32 box_bytes(const TensorMap& map) {
  u32 bytes = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// Calls visit(shared offset, address, bytes, inside) for each 16 bytes (or the end of a row) of the
// box at `at`; for pieces half outside of the tensor, element by element.
template <class Visit>
void visit_box(const TensorMap& map, const std::vector<s32>& at, u32 shared, const Visit& visit) {
  const u32 row_bytes = u32{map.box[0]} * map.element_bytes;
  const u32 rows = box_bytes(map) / row_bytes;
  for (u32 row = 0; row < rows; ++row) {
    u64 address = map.address;
    bool inside = true;
    u32 rest = row;
    for (int i = 1; i < map.rank; ++i) {
      const s64 position = at[static_cast<size_t>(i)] + s64{rest % map.box[i]};
      rest /= map.box[i];
      inside = inside && position >= 0 && position < map.size[i];
      address += static_cast<u64>(position) * map.pitch[i - 1];
    }
    for (u32 byte = 0; byte < row_bytes; byte += 16) {
      const u32 piece = std::min(16u, row_bytes - byte);
      const s64 first = at[0] + s64{byte / map.element_bytes};
      const s64 last = first + piece / map.element_bytes;
      const u32 to = swizzled(shared + row * row_bytes + byte, map.swizzle);
      const u64 from = address + static_cast<u64>(first * map.element_bytes);
      if (!inside || last <= 0 || first >= map.size[0]) {
        visit(to, from, piece, false);
      } else if (first >= 0 && last <= map.size[0]) {
        visit(to, from, piece, true);
      } else {
        for (u32 e = 0; e < piece; e += map.element_bytes) {
          const s64 x = first + e / map.element_bytes;
          visit(to + e, from + e, u32{map.element_bytes}, x >= 0 && x < map.size[0]);
        }
      }
    }
  }
}

// --- Loads
// ----------------------------------------------------------------------------------------

enum { kMulticast = 0, kAdds = 0, kRank = 1 };

void land(Machine& m, Cta& cta, const TensorMap& map, const std::vector<s32>& at, u32 to,
          u32 barrier, u32 pc) {
  visit_box(map, at, to, [&](u32 shared, u64 global, u32 bytes, bool inside) {
    u8* target = m.shared_raw(cta, shared, bytes, pc);
    if (inside) {
      std::memcpy(target, reinterpret_cast<const void*>(global), bytes);
    } else {
      std::memset(target, 0, bytes);
    }
  });
  const auto found = cta.mbarriers.find(barrier);
  if (found == cta.mbarriers.end() || !found->second.live) {
    throw Failure("the mbarrier of a TMA load is gone, line " + std::to_string(m.races.lines[pc]));
  }
  found->second.transactions -= box_bytes(map);
  m.complete_if_done(found->second);
  m.progress();
}

void load(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  const size_t rank = static_cast<size_t>(i.number[kRank]);
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    const u32 to = static_cast<u32>(w.value(i.in[0], l) + static_cast<u64>(i.number[2]));
    const u32 bar = static_cast<u32>(w.value(i.in[2], l) + static_cast<u64>(i.number[3]));
    const TensorMap map = map_at(m, w, w.value(i.in[1], l));
    if (map.rank != rank) m.fail(w, "a tensor map of another rank");
    std::vector<s32> at;
    for (size_t k = 0; k < rank; ++k) at.push_back(static_cast<s32>(w.value(i.in[3 + k], l)));
    const u32 alignment = map.swizzle == 0 ? 16 : 128;
    if (to % alignment != 0) m.fail(w, "a misaligned target of a TMA load");
    Cluster& cluster = *w.cta->cluster;
    Mask targets = 1u << (to >> kRankShift);
    if (i.number[kMulticast]) targets = static_cast<Mask>(w.value(i.in[3 + rank], l)) & 0xFFFF;
    if (targets == 0 || targets >> cluster.ctas.size() != 0)
      m.fail(w, "a TMA load to no CTA of the cluster");
    visit_box(map, at, to, [&](u32, u64 global, u32 bytes, bool inside) {
      if (!inside) return;
      m.touch_global(w, global, bytes, {w.agent(kRead), w.time, w.pc(), false, true});
      m.counts[w.pc()].bytes += bytes * static_cast<u32>(__builtin_popcount(targets));
    });
    for (u32 target = 0; target < cluster.ctas.size(); ++target) {
      if (!(targets >> target & 1)) continue;
      Cta& cta = *cluster.ctas[target];
      MBarrier& barrier = m.mbarrier(w, cta, bar);
      // Its init need not be fenced from the async proxy: compilers' code does without.
      const Access use{w.agent(kRead), w.time, w.pc(), false, false, Strength::kAtomic};
      m.touch_shared(cta, bar, 8, use, w.known);
      const Access write{barrier.agent, barrier.completed + 1, w.pc(), true, true};
      m.shared_raw(cta, to, box_bytes(map), w.pc());
      m.touch_shared(cta, to, box_bytes(map), write, w.known);
      m.visit(w, cta, write);
      const u32 pc = w.pc(), offset = to & kOffset;
      m.later([&m, &cta, map, at, offset, bar, pc] {
        land(m, cta, map, at, offset, bar & kOffset, pc);
      });
    }
  }
}

// --- Stores and additions
// ---------------------------------------------------------------------------------------

// Lanes that store the same box write the same bytes: a warp's store need not elect a lane, and
// hardware runs it once. What lanes add, ptxas has them add one by one.
bool is_repeated(const Warp& w, const Instruction& i, Mask lanes, int lane) {
  for (int other = 0; other < lane; ++other) {
    if (!(lanes >> other & 1)) continue;
    if (std::all_of(i.in.begin(), i.in.end(), [&](const Slot& slot) {
          return w.value(slot, lane) == w.value(slot, other);
        })) {
      return true;
    }
  }
  return false;
}

void store(Machine& m, Warp& w, const Instruction& i, Mask lanes) {
  const size_t rank = static_cast<size_t>(i.number[kRank]);
  const bool adds = i.number[kAdds];
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1) || (!adds && is_repeated(w, i, lanes, l))) continue;
    BulkStore made{map_at(m, w, w.value(i.in[0], l)),
                   {},
                   static_cast<u32>(w.value(i.in[1], l) + static_cast<u64>(i.number[2])),
                   w.store_groups,
                   w.pc(),
                   adds};
    if (made.map.rank != rank) m.fail(w, "a tensor map of another rank");
    if (adds && made.map.element == TensorMap::kCopied)
      m.fail(w, "an addition to elements of a type that is not modelled");
    for (size_t k = 0; k < rank; ++k) made.at.push_back(static_cast<s32>(w.value(i.in[2 + k], l)));
    Cta& cta = m.owner(w, made.from, false);
    if (made.from % (made.map.swizzle == 0 ? 16 : 128) != 0)
      m.fail(w, "a misaligned source of a TMA store");
    const u32 group = w.store_groups + 1;
    m.shared_raw(cta, made.from, box_bytes(made.map), w.pc());
    m.touch_shared(cta, made.from, box_bytes(made.map),
                   {w.agent(kBulkRead), group, w.pc(), false, true}, w.known);
    visit_box(made.map, made.at, made.from, [&](u32, u64 global, u32 bytes, bool inside) {
      if (!inside) return;
      // An addition reads, too, which a write counts for; each element's is atomic.
      m.touch_global(w, global, bytes,
                     {w.agent(kBulkWrite), group, w.pc(), true, true,
                      adds ? Strength::kAtomic : Strength::kWeak});
      m.counts[w.pc()].bytes += bytes;
    });
    w.stores.push_back(std::move(made));
  }
}

void commit(Machine&, Warp& w, const Instruction&, Mask) { ++w.store_groups; }

void wait(Machine& m, Warp& w, const Instruction& i, Mask) {
  const bool read = i.number[1];
  const s64 done = s64{w.store_groups} - i.number[0];
  for (BulkStore& store : w.stores) {
    if (store.group < done) m.advance(w, store, !read);
  }
  while (!w.stores.empty() && w.stores.front().read && w.stores.front().pieces.empty())
    w.stores.pop_front();
  if (done <= 0) return;
  w.known.happened.raise(w.agent(kBulkRead), static_cast<u32>(done));
  if (!read) w.known.happened.raise(w.agent(kBulkWrite), static_cast<u32>(done));
}

// --- Decoding

int take_rank(Decoder& d) {
  d.made.flow = Flow::kSwitch;
  d.made.once = true;
  const int rank = 1 + d.modifiers.take_one({"1d", "2d", "3d", "4d", "5d"});
  d.modifiers.take("tile");
  return rank;
}

void decode_store(Decoder& d, int rank, bool adds) {
  for (const char* name : {"global", "shared::cta", "bulk_group"}) d.modifiers.take_one({name});
  d.modifiers.take_cache_hints();
  d.made.number = {adds, rank};
  d.address(0, 8);
  d.made.number[2] = d.address(1, 4);
  for (int k = 0; k < rank; ++k) d.in(0, 4, 1 + k);
  d.made.run = store;
}

void decode_reduction(Decoder& d) {
  const int rank = take_rank(d);
  d.modifiers.take_one({"add"});
  decode_store(d, rank, true);
}

void decode_tensor(Decoder& d) {
  Modifiers& modifiers = d.modifiers;
  const int rank = take_rank(d);
  if (modifiers.left.empty()) throw Failure("it has no direction");
  if (modifiers.left[0] == "global") {
    decode_store(d, rank, false);
    return;
  }
  modifiers.take_one({"shared::cluster", "shared::cta"});
  modifiers.take_one({"global"});
  modifiers.take_one({"mbarrier::complete_tx::bytes"});
  const bool multicast = modifiers.take("multicast::cluster");
  modifiers.take_cache_hints();
  d.made.number = {multicast, rank};
  d.made.number[2] = d.address(0, 4);
  d.address(1, 8);
  d.made.number[3] = d.address(2, 4);
  for (int k = 0; k < rank; ++k) d.in(1, 4, 1 + k);
  if (multicast) d.in(3, 2);
  d.made.run = load;
}

void decode_bulk(Decoder& d) {
  d.made.flow = Flow::kSwitch;
  d.made.once = true;
  if (d.modifiers.take("commit_group")) {
    d.made.run = commit;
  } else {
    d.modifiers.take_one({"wait_group"});
    d.made.number = {d.immediate(0), d.modifiers.take("read")};
    d.made.run = wait;
  }
}

// Adds in the elements' own type, each sum rounded to nearest.
template <class T>
void add_elements(u64 address, const u8* data, u32 bytes) {
  for (u32 at = 0; at < bytes; at += sizeof(T)) {
    T there, more;
    auto* to = reinterpret_cast<u8*>(address) + at;
    std::memcpy(&there, to, sizeof(T));
    std::memcpy(&more, data + at, sizeof(T));
    const float sum = static_cast<float>(there) + static_cast<float>(more);
    if constexpr (std::is_same_v<T, float>) {
      std::memcpy(to, &sum, sizeof(T));
    } else {
      const T rounded = T::of(sum);
      std::memcpy(to, &rounded, sizeof(T));
    }
  }
}

void add_piece(const TensorMap& map, const BulkStore::Piece& piece) {
  if (map.element == TensorMap::kF16) {
    add_elements<Half>(piece.address, piece.data, piece.bytes);
  } else if (map.element == TensorMap::kBf16) {
    add_elements<Bfloat>(piece.address, piece.data, piece.bytes);
  } else {
    add_elements<float>(piece.address, piece.data, piece.bytes);
  }
}

}  // namespace

// Reads shared memory, if that is still to be done; then writes global memory, if it shall. What is
// added is added to memory itself, at once: to a store that is held back, too.
void Machine::advance(Warp& warp, BulkStore& store, bool to_memory) {
  if (!store.read) {
    store.read = true;
    visit_box(store.map, store.at, store.from, [&](u32 shared, u64 global, u32 bytes, bool inside) {
      const u8* from = shared_raw(*warp.cta, shared, bytes, store.pc);
      if (!inside) return;
      BulkStore::Piece piece{global, {}, bytes};
      std::memcpy(piece.data, from, bytes);
      store.pieces.push_back(piece);
    });
  }
  if (!to_memory) return;
  for (const auto& piece : store.pieces) {
    if (store.adds) {
      commit(*warp.cta, piece.address, piece.bytes);
      add_piece(store.map, piece);
      news();
      continue;
    }
    store_weak(*warp.cta, piece.address, piece.data, piece.bytes, warp.agent(kBulkWrite),
               store.group + 1);
  }
  store.pieces.clear();
}

void add_tma(Table& table) {
  table.family("cp.async.bulk.tensor", decode_tensor);
  table.family("cp.reduce.async.bulk.tensor", decode_reduction);
  table.family("cp.async.bulk", decode_bulk);
}

}  // namespace ptx
