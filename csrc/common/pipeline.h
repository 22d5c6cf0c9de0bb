// The two queues between the producer warp and the consumer warpgroups, in shared memory: a ring of
// stages that TMA fills and wgmma empties, and the tickets of the items those stages belong to.
//
// The CTAs of a cluster work on the same items, on consecutive blocks of rows: they share the right
// operand, so each loads its part of it for all. A stage is therefore empty when the consumers of
// every CTA have left it. The first CTA takes the tickets and hands them to all.
//
// Each slot has a full and an empty barrier. Both sides walk the slots in the same order and flip
// the parity they wait for on every wrap; a producer's first wait on an empty slot is for parity 1,
// which a fresh barrier has already passed.
#pragma once

#include "layout.h"
#include "ptx.h"

namespace lora {

constexpr int kConsumerWarpgroups = 2;
constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
constexpr int kThreads = 128 * (1 + kConsumerWarpgroups);
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

constexpr int kPanelsA = 2, kPanelsB = 4;  // a stage: 128 rows of the left, 256 of the right
constexpr int kStageBytes = (kPanelsA + kPanelsB) * kPanelBytes;
constexpr int kStages = 4;
constexpr int kTickets = 2;

// Dynamic shared memory: stages, then two store panels per consumer warpgroup, then the barriers.
constexpr int kStoreOffset = kStages * kStageBytes;
constexpr int kStorePanels = 2;
constexpr int kBarrierOffset = kStoreOffset + kConsumerWarpgroups * kStorePanels * kPanelBytes;
constexpr int kTicketOffset = kBarrierOffset + 8 * 2 * (kStages + kTickets);
constexpr int kSharedBytes = 1024 + kTicketOffset + 4 * kTickets;  // 1024 to align the first stage
static_assert(kSharedBytes <= 227 * 1024, "an SM of compute capability 9.0 has 227 KiB for a CTA");
static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters <= 65536, "the register file");

LORA_DEVICE uint32_t shared_base() { return (ptx::dynamic_shared() + 1023) & ~1023u; }

LORA_DEVICE int consumer() { return ptx::thread_index() / 128 - 1; }
LORA_DEVICE int consumer_thread() { return ptx::thread_index() % 128; }

// Hardware barriers: one for each consumer warpgroup, and one for both together.
LORA_DEVICE int own_barrier() { return 1 + consumer(); }
constexpr int kConsumersBarrier = 1 + kConsumerWarpgroups;

// Position in a queue of kSlots slots whose barriers start at `barriers`: full ones, then empty.
template <int kSlots>
struct Queue {
  uint32_t barriers;
  int slot = 0;
  uint32_t parity = 0;

  LORA_DEVICE uint32_t full() const { return barriers + 8 * slot; }
  LORA_DEVICE uint32_t empty() const { return barriers + 8 * (kSlots + slot); }
  LORA_DEVICE void await_full() const { ptx::barrier_wait(full(), parity); }
  LORA_DEVICE void await_empty() const { ptx::barrier_wait(empty(), parity ^ 1); }

  LORA_DEVICE void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// One side's view of both queues.
struct Pipeline {
  int ctas;       // of the cluster
  bool rewrites;  // whether consumers write into stages that another CTA's loads will overwrite
  int rank = ptx::cluster_rank();
  uint32_t base = shared_base();
  Queue<kStages> stages{base + kBarrierOffset};
  Queue<kTickets> tickets{base + kBarrierOffset + 16 * kStages};

  LORA_DEVICE uint32_t left() const { return base + stages.slot * kStageBytes; }
  LORA_DEVICE uint32_t right() const { return left() + kPanelsA * kPanelBytes; }
  LORA_DEVICE uint32_t ticket_address() const { return base + kTicketOffset + 4 * tickets.slot; }

  LORA_DEVICE Pipeline(int ctas, bool rewrites) : ctas(ctas), rewrites(rewrites) {}

  // By one thread, before the cluster synchronises.
  LORA_DEVICE void init() const {
    for (int i = 0; i < kStages; ++i) {
      ptx::barrier_init(stages.barriers + 8 * i, 1);
      ptx::barrier_init(stages.barriers + 8 * (kStages + i), kConsumerWarps * ctas);
    }
    for (int i = 0; i < kTickets; ++i) {
      ptx::barrier_init(tickets.barriers + 8 * i, 1);
      // Readers are all consumer warps and the producers beside the first, which wrote it.
      ptx::barrier_init(tickets.barriers + 8 * (kTickets + i), kConsumerWarps * ctas + ctas - 1);
    }
    ptx::fence_barrier_init();
  }

  // By the producer: the next stage may be loaded into, everywhere in the cluster.
  LORA_DEVICE void await_empty() const {
    if (rewrites) {
      ptx::barrier_wait_cluster(stages.empty(), stages.parity ^ 1);
    } else {
      stages.await_empty();
    }
  }

  // Leaves a stage, given its empty barrier: each consumer warp arrives at every CTA. Reads alone
  // need no release to the cluster, which is a MEMBAR.ALL.GPU; writes of this CTA's do, as the
  // other's multicast comes next.
  template <bool kRewrote>
  LORA_DEVICE void release(uint32_t empty_barrier) const {
    const int lane = ptx::thread_index() % 32;
    if (lane >= ctas) return;
    if constexpr (kRewrote) {
      ptx::barrier_arrive_cluster(ptx::in_cta(empty_barrier, lane));
    } else {
      ptx::barrier_arrive(ptx::in_cta(empty_barrier, lane));
    }
  }

  // By the producer of the first CTA.
  LORA_DEVICE void put_ticket(uint32_t ticket) {
    tickets.await_empty();
#pragma unroll 1
    for (int cta = 0; cta < ctas; ++cta) {
      ptx::store_cluster(ptx::in_cta(ticket_address(), cta), ticket);
      ptx::barrier_arrive_cluster(ptx::in_cta(tickets.full(), cta));
    }
    tickets.advance();
  }

  // By a consumer warp, or by the one producer thread of another CTA.
  LORA_DEVICE uint32_t get_ticket(bool whole_warp) {
    ptx::barrier_wait_cluster(tickets.full(), tickets.parity);
    const uint32_t ticket = ptx::load_shared(ticket_address());
    if (whole_warp) ptx::warp_sync();  // all lanes have read before one arrives for the warp
    if (!whole_warp || ptx::thread_index() % 32 == 0) {
      ptx::barrier_arrive(ptx::in_cta(tickets.empty(), 0));
    }
    tickets.advance();
    return ticket;
  }
};

}  // namespace lora
