// What a launch consists of while it runs: clusters of CTAs of warps.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "opcodes.h"
#include "races.h"
#include "tensor_map.h"

namespace ptx {

struct Cta;

// Lanes of a warp that are at the same instruction.
struct Fragment {
  u32 pc;
  Mask lanes;
  bool parked = false;  // waits for the rest of the warp
  bool behind = false;  // runs when no other can
};

// cp.async: one lane's bytes on their way to shared memory.
struct Copy {
  u64 from;
  u32 to;
  int bytes, given;  // the rest is zeros
  u32 group;
  u32 pc;
};

// wgmma: a product on its way, of this warp's 16 rows.
struct Product {
  const Instruction* instruction;
  u64 a, b;  // descriptors, unless A is in registers
  bool accumulates;
  u32 group;
  bool done = false;
};

// cp.async.bulk to global memory: a box on its way, read first and written, or added, later.
struct BulkStore {
  struct Piece {
    u64 address;
    u8 data[16];
    u32 bytes;
  };
  TensorMap map;
  std::vector<s32> at;
  u32 from;
  u32 group;
  u32 pc;
  bool adds;
  bool read = false;
  std::vector<Piece> pieces;
};

struct Warp {
  Cta* cta;
  u32 index, id;  // in the CTA, in the grid
  std::vector<u8> file;
  std::vector<Fragment> fragments;
  size_t current = 0;
  Mask alive = 0;

  enum State { kReady, kAtBarrier, kAsleep, kGone } state = kReady;
  std::string waits_for;  // in words, for the report of a dead end
  bool again = false;     // the instruction could not run yet
  bool yields = false;    // let another warp run
  struct {
    u32 pc = ~0u;
    u64 address, value, news;
  } poll;  // the last strong load or atomic

  u32 time = 1;
  Knowledge known;
  KnowledgeByScope announced;  // by releasing fences: what a relaxed store or atomic tells others
  KnowledgeByScope heard;      // of relaxed loads: known after an acquiring fence as wide as that
  u32 inits_announced = 0;     // the time of the last fence.mbarrier_init

  std::deque<Copy> copies;
  u32 copy_groups = 0;
  std::deque<Product> products;
  u32 product_groups = 0;
  bool product_fenced = false;
  // File offsets, sorted, of registers that products on their way read and write, or only read.
  std::vector<u32> accumulating, read_by_products;
  std::deque<BulkStore> stores;
  u32 store_groups = 0;
  bool cluster_arrived = false;
  u64 cluster_phase = 0;
  int registers = 0;  // per thread, as setmaxnreg has left them

  u32 agent(Kind kind) const { return id * kKinds + kind; }
  void know_itself() {
    for (const Kind kind : {kRead, kWrite, kInit}) known.happened.raise(agent(kind), time);
  }
  template <class T>
  T* lanes(Slot slot) {
    return reinterpret_cast<T*>(&file[slot.at]);
  }
  Mask& predicate(Slot slot) { return *reinterpret_cast<Mask*>(&file[slot.at]); }
  u32 pc() const { return fragments[current].pc; }

  // The lanes' values of a register, whatever its width.
  u64 value(Slot slot, int lane) const {
    u64 v = 0;
    std::memcpy(&v, &file[slot.at + slot.bytes * static_cast<u32>(lane)], slot.bytes);
    return v;
  }
  void set(Slot slot, int lane, u64 v) {
    std::memcpy(&file[slot.at + slot.bytes * static_cast<u32>(lane)], &v, slot.bytes);
  }
  template <class T>
  void write(Slot slot, const T (&values)[kLanes], Mask mask) {
    T* to = lanes<T>(slot);
    if (mask == kAll) {
      std::memcpy(to, values, sizeof(values));
    } else {
      for (int l = 0; l < kLanes; ++l) {
        if (mask >> l & 1) to[l] = values[l];
      }
    }
  }
  void write_predicate(Slot slot, Mask values, Mask mask) {
    if (slot.bytes != 0) predicate(slot) = (predicate(slot) & ~mask) | (values & mask);
  }
};

// bar.sync
struct CtaBarrier {
  bool whole = false;  // of all threads of the CTA
  int expected = 0, arrived = 0;
  Knowledge brought;
  std::vector<Warp*> waiting;
};

struct MBarrier {
  u32 agent;
  bool live = false;
  u32 expected = 0, pending = 0;
  s64 transactions = 0;
  u32 phase = 0;      // since the last init: its lowest bit is the parity
  u32 completed = 0;  // ever: the agent's time
  // What waiters of CTA scope and of cluster scope get to know: of the current phase, of past ones.
  Knowledge coming[2], complete[2];
  std::vector<Warp*> waiting;
};

// A weak store to global memory that others need not see yet.
struct Pending {
  u8 data[16];
  u16 bytes = 0;
  u32 agent, time;
};

struct Cluster;

struct Cta {
  u32 id, rank;
  u32 index[3];  // %ctaid
  Cluster* cluster;
  std::vector<u8> shared;
  std::vector<Cell> cells;
  std::vector<Warp> warps;
  CtaBarrier barriers[16];
  std::map<u32, MBarrier> mbarriers;
  std::map<u64, Pending> pending;  // by address / 16
  int live = 0;                    // warps
  int registers_free = 0;          // given up
  // Accesses of other CTAs and of TMA, the last of each agent: they must end before the CTA does.
  struct Visit {
    u32 time, pc;
    bool write;
  };
  std::map<u32, Visit> visits;
  Clock left;  // what the warps that have left had known
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  int arrived = 0, size = 0;  // warps, at barrier.cluster
  u64 phase = 0;
  Knowledge coming, complete;
  std::vector<Warp*> waiting;
  int live = 0;  // CTAs
};

}  // namespace ptx
