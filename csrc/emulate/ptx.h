// The primitives of common/ptx.h and common/wgmma.h on the model of machine.h. The layouts follow
// the PTX ISA: TMA's 128-byte swizzle, wgmma's canonical layouts and fragments, stmatrix.
#pragma once

#include <bit>

#include "../common/types.h"
#include "machine.h"

#define LORA_KERNEL(threads) inline void
#define LORA_PARAMETER
#define LORA_DEVICE inline
#define LORA_HOST_DEVICE inline

namespace lora {

namespace ptx {

using emulate::Machine;

inline int thread_index() { return Machine::thread().index; }
inline int block_count() { return Machine::get().blocks(); }
inline int cluster_rank() { return Machine::cta().rank; }
inline void cluster_sync() {
  emulate::Cta& first = *Machine::cta().cluster[0];
  Machine::get().meet(first, 0, 384 * static_cast<int>(first.cluster.size()));
}

// Every shared address, this CTA's own too, names its CTA by the rank in bits 24 and up, as on
// sm_90 (SASS makes the window's base of SR_CgaCtaId << 24).
constexpr uint32_t kOffset = 0xFFFFFF;
inline uint32_t in_cta(uint32_t address, uint32_t rank) { return (address & kOffset) | rank << 24; }
inline emulate::Cta& cta_of(uint32_t address) {
  emulate::Cta& cta = *Machine::cta().cluster[address >> 24];
  Machine::require(cta.unfinished == 384, "access to a CTA whose threads have begun to leave");
  return cta;
}

// Where an address that must be this CTA's own lies in its shared memory.
inline uint32_t own(uint32_t address) {
  Machine::require(static_cast<int>(address >> 24) == cluster_rank(),
                   "an address of another CTA where only this one's will do");
  return address & kOffset;
}

inline uint32_t dynamic_shared() { return in_cta(emulate::kSharedStart, cluster_rank()); }

// --- Ordinary access to shared memory ------------------------------------------------------------

inline void write_shared(uint32_t address, const void* bytes, uint32_t count) {
  address = own(address);
  Machine::require(address % count == 0 && address + count <= emulate::kSharedBytes,
                   "misaligned or overrunning access to shared memory");
  std::memcpy(&Machine::cta().ordinary[address], bytes, count);
  Machine::thread().unfenced.push_back({address, count});
}

inline uint32_t load_shared(uint32_t address) {
  uint32_t value;
  std::memcpy(&value, &Machine::cta().ordinary[own(address)], 4);
  return value;
}
inline void store_cluster(uint32_t address, uint32_t value) {
  std::memcpy(&cta_of(address).ordinary[address & kOffset], &value, 4);
}
inline void load_shared(uint32_t address, uint32_t (&v)[4]) {
  std::memcpy(v, &Machine::cta().ordinary[own(address)], 16);
}
inline void load_shared(uint32_t address, float (&v)[4]) {
  std::memcpy(v, &Machine::cta().ordinary[own(address)], 16);
}
inline void store_shared(uint32_t address, float v) { write_shared(address, &v, 4); }
inline void store_shared(uint32_t address, float first, float second) {
  const float v[] = {first, second};
  write_shared(address, v, 8);
}
inline void store_shared(uint32_t address, const uint32_t (&v)[4]) { write_shared(address, v, 16); }

inline void gather_warp(uint32_t value, uint32_t (&values)[32]) {
  values[0] = value;
  Machine::get().meet(100 + thread_index() / 32, 32, values);
}

template <bool kTransposed>
inline void store_matrix(uint32_t address, const uint32_t (&v)[4]) {
  const int lane = thread_index() % 32;
  uint32_t addresses[32], fragments[32];
  gather_warp(address, addresses);
  for (int matrix = 0; matrix < 4; ++matrix) {
    gather_warp(v[matrix], fragments);
    if (lane / 8 != matrix) continue;
    uint16_t row[8];  // the row this lane names, gathered from the lanes that hold it
    for (int i = 0; i < 8; ++i) {
      const int r = kTransposed ? i : lane % 8, c = kTransposed ? lane % 8 : i;
      row[i] = static_cast<uint16_t>(fragments[4 * r + c / 2] >> (16 * (c % 2)));
    }
    write_shared(addresses[lane], row, 16);
  }
}

inline uint32_t shuffle_quad(uint32_t value, int source) {
  uint32_t values[32];
  gather_warp(value, values);
  return values[thread_index() % 32 / 4 * 4 + source];
}

// --- Barriers ------------------------------------------------------------------------------------

inline emulate::Barrier& barrier_at(emulate::Cta& cta, uint32_t offset) {
  Machine::require(cta.barriers.count(offset) == 1, "no mbarrier at this address");
  return cta.barriers[offset];
}

inline void complete_if_done(emulate::Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  ++barrier.phase;
  Machine::get().wake(barrier.waiters);
}

inline void barrier_init(uint32_t address, uint32_t arrivals) {
  emulate::Barrier barrier;
  barrier.expected = barrier.pending = static_cast<int>(arrivals);
  Machine::cta().barriers[own(address)] = barrier;
}
inline void fence_barrier_init() {}

inline void arrive(emulate::Barrier& barrier) {
  Machine::require(barrier.pending > 0, "more arrivals than the mbarrier expects");
  --barrier.pending;
  complete_if_done(barrier);
}

inline void barrier_arrive_expecting(uint32_t address, uint32_t bytes) {
  emulate::Barrier& barrier = barrier_at(Machine::cta(), own(address));
  barrier.bytes += static_cast<int>(bytes);
  arrive(barrier);
}

inline void barrier_arrive(uint32_t address) {
  emulate::Barrier& barrier = barrier_at(cta_of(address), address & kOffset);
  const bool strikes = Machine::get().random(50) == 0;
  if (strikes && Machine::faulty("an arrival is lost")) return;
  if (strikes && Machine::faulty("an arrival too many")) arrive(barrier);
  arrive(barrier);
}

inline void barrier_wait(uint32_t address, uint32_t parity) {
  emulate::Barrier& barrier = barrier_at(Machine::cta(), own(address));
  if (Machine::faulty("a barrier lets through early") && Machine::get().random(50) == 0) return;
  if (Machine::faulty("the first phase is waited for twice") && barrier.phase == 0) parity = 0;
  Machine::get().wait(barrier.waiters, [&] { return barrier.phase % 2 != parity; });
}

inline void barrier_wait_cluster(uint32_t address, uint32_t parity) {
  barrier_wait(address, parity);
}
inline void barrier_arrive_cluster(uint32_t address) { barrier_arrive(address); }

inline void warpgroup_sync(int id) { Machine::get().meet(id, 128); }
inline void consumers_sync(int id) { Machine::get().meet(id, 256); }
inline void warp_sync() {
  uint32_t values[32];
  gather_warp(0, values);
}
inline bool elect() {
  warp_sync();
  return thread_index() % 32 == 13;  // any lane may be the one
}

// --- Proxies and the memory model ----------------------------------------------------------------

inline void fence_proxy_async_shared() {
  if (Machine::faulty("no shared proxy fence")) return;
  emulate::Cta& cta = Machine::cta();
  for (const auto& [address, count] : Machine::thread().unfenced) {
    std::memcpy(&cta.async[address], &cta.ordinary[address], count);
  }
  Machine::thread().unfenced.clear();
}

inline void fence_acq_rel_gpu() {
  if (!Machine::faulty("no acquire")) Machine::thread().needs_acquire = false;
}

inline void fence_proxy_async_global() {
  Machine::require(!Machine::thread().needs_acquire, "a proxy fence before the acquire");
  if (!Machine::faulty("no global proxy fence")) Machine::thread().needs_proxy_fence = false;
}

inline uint32_t load_relaxed(const uint32_t* address) {
  Machine::get().spin();
  Machine::thread().needs_acquire = Machine::thread().needs_proxy_fence = true;
  return *address;
}

inline uint32_t fetch_add_relaxed(uint32_t* address, uint32_t value) {
  Machine::get().yield();
  const uint32_t old = *address;
  *address += value;
  return old;
}

inline void add_relaxed(uint32_t* address, uint32_t value) { fetch_add_relaxed(address, value); }
inline void store_relaxed(uint32_t* address, uint32_t value) { *address = value; }

// --- TMA -----------------------------------------------------------------------------------------

// Calls visit(shared address, global pointer or null outside the tensor) for each element of a box.
template <class Visit>
inline void for_box(const TensorMap& map, uint32_t shared, int inner, int outer,
                    const Visit& visit) {
  const bool swizzled = !Machine::faulty("TMA does not swizzle");
  for (int row = 0; row < map.box_rows; ++row) {
    for (int column = 0; column < 128 / map.element_bytes; ++column) {
      uint32_t address = shared + row * 128 + column * map.element_bytes;
      if (swizzled) address ^= (address >> 7 & 7) << 4;
      const int64_t r = int64_t{outer} + row, c = int64_t{inner} + column;
      const bool inside = r >= 0 && r < map.rows && c >= 0 && c < map.columns;
      visit(address, inside ? map.data + r * map.pitch_bytes + c * map.element_bytes : nullptr);
    }
  }
}

inline void tma_load_multicast(uint32_t target, const TensorMap* map, uint32_t barrier, int inner,
                               int outer, uint16_t ctas) {
  target = own(target);
  barrier = own(barrier);
  Machine::require(target % 1024 == 0, "a panel must be aligned to 1024 bytes");
  Machine::require(map->data != nullptr, "TMA load from an absent tensor");
  emulate::Thread& thread = Machine::thread();
  Machine::require(!thread.needs_acquire && !thread.needs_proxy_fence,
                   "a TMA load behind a flag without acquire and proxy fence");
  for (emulate::Cta* cta : thread.cta->cluster) {  // each copy arrives in its own time
    if ((ctas >> cta->rank & 1) == 0) continue;
    Machine::get().start([=, map = *map] {
      Machine::require(cta->unfinished == 384, "TMA load into a CTA that has begun to leave");
      for_box(map, target, inner, outer, [&](uint32_t address, const uint8_t* element) {
        uint32_t value = 0;
        if (element != nullptr) std::memcpy(&value, element, map.element_bytes);
        std::memcpy(&cta->ordinary[address], &value, map.element_bytes);
        std::memcpy(&cta->async[address], &value, map.element_bytes);
      });
      emulate::Barrier& full = cta->barriers[barrier];
      full.bytes -= map.box_rows * 128;
      complete_if_done(full);
    });
  }
}

inline void tma_load(uint32_t target, const TensorMap* map, uint32_t barrier, int inner,
                     int outer) {
  const auto self = static_cast<uint16_t>(1 << cluster_rank());
  tma_load_multicast(target, map, barrier, inner, outer, self);
}

inline void tma_store(const TensorMap* map, uint32_t source, int inner, int outer) {
  source = own(source);
  Machine::require(source % 1024 == 0, "a panel must be aligned to 1024 bytes");
  Machine::require(map->data != nullptr, "TMA store to an absent tensor");
  emulate::Cta* cta = Machine::thread().cta;
  auto values = std::make_shared<std::vector<std::pair<uint8_t*, uint32_t>>>();
  Machine::thread().open_stores.push_back(Machine::get().start(
      [=, map = *map] {
        for_box(map, source, inner, outer, [&](uint32_t address, uint8_t* element) {
          if (element == nullptr) return;
          uint32_t value;
          std::memcpy(&value, &cta->async[address], map.element_bytes);
          values->push_back({element, value});
        });
      },
      [=, bytes = map->element_bytes] {
        for (const auto& [element, value] : *values) std::memcpy(element, &value, bytes);
      }));
}

inline void tma_store_commit() {
  Machine::get().stall();
  emulate::Thread& thread = Machine::thread();
  thread.store_groups.push_back(std::move(thread.open_stores));
  thread.open_stores.clear();
}

inline void advance_stores(size_t pending, int steps) {
  Machine::get().stall();
  auto& groups = Machine::thread().store_groups;
  for (size_t i = 0; i + pending < groups.size(); ++i) {
    for (const emulate::Store& store : groups[i]) store->advance(steps);
  }
  while (!groups.empty() && groups.front().back()->next == 2) groups.pop_front();
}

template <int kPending>
inline void tma_store_wait_read() {
  if (!Machine::faulty("a store's shared memory is reused at once")) advance_stores(kPending, 1);
}
inline void tma_store_wait_written() {
  advance_stores(0, Machine::faulty("written stands for read") ? 1 : 2);
}

// --- Warpgroup matrix multiply -------------------------------------------------------------------

// Reads the `rows` x 16 operand behind a descriptor, in the canonical layouts of layout.h.
inline void read_operand(const emulate::Product& p, uint64_t descriptor, bool mn, int rows,
                         const emulate::Cta& cta, float* out) {
  const uint32_t start = (descriptor & 0x3FFF) << 4;
  uint32_t leading = (descriptor >> 16 & 0x3FFF) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
  if (Machine::faulty("the leading offset is ignored")) leading = 1024;
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < 16; ++k) {
      uint32_t address =
          start + (mn ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                      : row / 8 * stride + row % 8 * 128 + k * 2);
      address ^= (address >> 7 & 7) << 4;
      uint16_t bits;
      std::memcpy(&bits, &cta.async[address], 2);
      out[k * rows + row] = p.unpack(bits);
    }
  }
}

inline void multiply(const emulate::Cta& cta, int warp, const emulate::Product& p) {
  Machine::require(p.a >> 62 == 1 && p.b >> 62 == 1, "the layouts here are 128-byte swizzled");
  static float a[16 * 64], b[16 * 256];
  read_operand(p, p.a, p.mn_a, 64, cta, a);
  read_operand(p, p.b, p.mn_b, p.n, cta, b);
  for (int row = 0; row < 16; ++row) {
    float sums[256] = {};
    for (int k = 0; k < 16; ++k) {
      const float left = a[k * 64 + 16 * warp + row];
      for (int n = 0; n < p.n; ++n) sums[n] += left * b[k * p.n + n];
    }
    for (int n = 0; n < p.n; ++n) {
      p.accumulators[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2] += sums[n];
    }
  }
}

inline emulate::Warp& warp() { return Machine::cta().warps[thread_index() / 32]; }

inline void multiply_up_to(size_t end) {
  for (emulate::Warp& w = warp(); w.done < end && w.products[w.done].arrived == 32; ++w.done) {
    multiply(Machine::cta(), thread_index() / 32 % 4, w.products[w.done]);
  }
}

inline void wgmma_fence() { Machine::thread().may_multiply = true; }

inline void start_product(uint64_t a, uint64_t b, int n, bool mn_a, bool mn_b,
                          float (*unpack)(uint16_t), float* accumulators) {
  emulate::Thread& thread = Machine::thread();
  Machine::require(thread.may_multiply, "wgmma on accumulators without wgmma.fence");
  emulate::Warp& w = warp();
  if (thread.products == w.products.size()) {
    w.products.push_back({a, b, n, mn_a, mn_b, unpack, {}, 0});
  }
  emulate::Product& product = w.products[thread.products++];
  Machine::require(product.a == a && product.b == b && product.n == n,
                   "the threads of a warp disagree on a wgmma");
  product.accumulators[thread.index % 32] = accumulators;
  if (++product.arrived == 32) {
    Machine::get().wake(w.waiters);
    if (Machine::get().random(2) == 0) multiply_up_to(thread.products);
  }
}

inline void wgmma_commit() {
  Machine::thread().product_groups.push_back(Machine::thread().products);
}

template <int kPending>
inline void wgmma_wait() {
  emulate::Thread& thread = Machine::thread();
  thread.may_multiply = false;
  auto& groups = thread.product_groups;
  if (groups.size() <= kPending) return;
  const size_t end = groups[groups.size() - 1 - kPending];
  groups.erase(groups.begin(), groups.end() - kPending);
  if (Machine::faulty("a product is not waited for") && kPending == 1) return;
  emulate::Warp& w = warp();
  Machine::get().wait(w.waiters, [&] { return w.products[end - 1].arrived == 32; });
  multiply_up_to(end);
}

template <int kCount>
inline void pin(float (&)[kCount]) {}
template <int kRegisters>
inline void give_up_registers() {}
template <int kRegisters>
inline void claim_registers() {}

// --- Elements ------------------------------------------------------------------------------------

template <class Element>
inline uint16_t round_to(float value) {
  if constexpr (std::is_same_v<Element, Fp16>) {
    return std::bit_cast<uint16_t>(static_cast<_Float16>(value));
  } else {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

template <class Element>
inline uint32_t pack(float low, float high) {
  return uint32_t{round_to<Element>(low)} | uint32_t{round_to<Element>(high)} << 16;
}

template <class Element>
inline float unpack(uint16_t bits) {
  if constexpr (std::is_same_v<Element, Fp16>) {
    return static_cast<float>(std::bit_cast<_Float16>(bits));
  } else {
    return std::bit_cast<float>(uint32_t{bits} << 16);
  }
}

template <class Element, int kN, bool kMnA, bool kMnB>
struct Wgmma {
  static void run(float (&d)[kN / 2], uint64_t a, uint64_t b) {
    start_product(a, b, kN, kMnA, kMnB, unpack<Element>, d);
  }
};

}  // namespace ptx
}  // namespace lora
