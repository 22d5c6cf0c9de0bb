// Thin names for the PTX instructions the kernels use, one instruction (or one spin) each.
//
// Shared memory is addressed by 32-bit shared-window addresses, never by pointers.
// Source of every rule quoted here: the PTX ISA, sections "mbarrier", "Data Movement: bulk copy",
// "wgmma" and "Memory Consistency Model: proxies".
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

#define LORA_DEVICE __device__ __forceinline__
#define LORA_HOST_DEVICE __host__ __device__ __forceinline__

namespace lora {

using TensorMap = CUtensorMap;
namespace ptx {

LORA_DEVICE int thread_index() { return threadIdx.x; }
LORA_DEVICE int block_count() { return gridDim.x; }

// A cluster is one or two CTAs that run at the same time and can reach each other's shared memory.
LORA_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

LORA_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Returns where this CTA's shared address lies in the CTA `rank` of the cluster.
LORA_DEVICE uint32_t in_cta(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

LORA_DEVICE uint32_t dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

LORA_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// To a CTA of the cluster: `address` comes from in_cta.
LORA_DEVICE void store_cluster(uint32_t address, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

LORA_DEVICE void load_shared(uint32_t address, uint32_t (&v)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

LORA_DEVICE void load_shared(uint32_t address, float (&v)[4]) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(address)
               : "memory");
}

LORA_DEVICE void store_shared(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

LORA_DEVICE void store_shared(uint32_t address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second)
               : "memory");
}

LORA_DEVICE void store_shared(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

// Stores four 8x8 matrices of 16-bit elements: lane l names the row l%8 of matrix l/8 and holds, of
// each matrix, row l/4, columns 2*(l%4) and the next. kTransposed swaps rows and columns in memory.
template <bool kTransposed>
LORA_DEVICE void store_matrix(uint32_t address, const uint32_t (&v)[4]) {
  if constexpr (kTransposed) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
        "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
        : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  }
}

// Returns `value` of the lane `source` of this group of four lanes.
LORA_DEVICE uint32_t shuffle_quad(uint32_t value, int source) {
  return __shfl_sync(0xFFFFFFFFu, value, source, 4);
}

// --- Barriers ------------------------------------------------------------------------------------

LORA_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barrier_init visible to the async proxy, which will complete transactions on the barrier.
LORA_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// At a CTA of the cluster: `barrier` comes from in_cta. Says that this warp's reads are over and,
// in its own CTA only, releases its writes; a release to the cluster would be a MEMBAR.ALL.GPU.
LORA_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same, and what this thread has written becomes visible to those who wait_cluster for it.
LORA_DEVICE void barrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}

LORA_DEVICE void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Returns once the phase of parity `parity` is complete; parity 1 of a fresh barrier already is.
LORA_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

LORA_DEVICE void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Every thread of the warpgroup meets at the hardware barrier `id` (1 to 15).
LORA_DEVICE void warpgroup_sync(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

// Every thread of both consumer warpgroups meets at the hardware barrier `id`.
LORA_DEVICE void consumers_sync(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }

LORA_DEVICE void warp_sync() { __syncwarp(); }

// True in one lane of the warp, always the same one; all lanes must come here. What it guards the
// compiler knows to be one thread, and spares TMA a loop over the lanes that might be active.
LORA_DEVICE bool elect() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred leader;\n"
      "elect.sync _|leader, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, leader;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// --- Proxies and the memory model ----------------------------------------------------------------

// Orders this thread's ordinary writes to shared memory before later reads by wgmma and TMA. The
// unqualified form would cost a MEMBAR.ALL.GPU.
LORA_DEVICE void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders what this thread has acquired from global memory before its later TMA loads.
LORA_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

LORA_DEVICE void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

LORA_DEVICE uint32_t load_relaxed(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

LORA_DEVICE uint32_t fetch_add_relaxed(uint32_t* address, uint32_t value) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(address), "r"(value)
               : "memory");
  return old;
}

LORA_DEVICE void store_relaxed(uint32_t* address, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

LORA_DEVICE void add_relaxed(uint32_t* address, uint32_t value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// --- TMA -----------------------------------------------------------------------------------------

// Starts copying the box at (inner, outer) to shared memory; elements outside the tensor become
// zero, and the barrier receives the bytes of the whole box either way.
LORA_DEVICE void tma_load(uint32_t target, const TensorMap* map, uint32_t barrier, int inner,
                          int outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(inner), "r"(outer)
      : "memory");
}

// The same to every CTA of the cluster in `ctas`: to the same address, signalling the same barrier.
LORA_DEVICE void tma_load_multicast(uint32_t target, const TensorMap* map, uint32_t barrier,
                                    int inner, int outer, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(inner), "r"(outer), "h"(ctas)
      : "memory");
}

// Starts copying shared memory to the box at (inner, outer); outside the tensor nothing is written.
LORA_DEVICE void tma_store(const TensorMap* map, uint32_t source, int inner, int outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(source), "r"(inner), "r"(outer)
      : "memory");
}

// The same, but what is there already is added to, each element rounded to nearest in its own type.
// It belongs to the same groups as stores do.
LORA_DEVICE void tma_add(const TensorMap* map, uint32_t source, int inner, int outer) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], "
      "[%1];" ::"l"(map),
      "r"(source), "r"(inner), "r"(outer)
      : "memory");
}

LORA_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the latest kPending groups of this thread have read their shared memory.
template <int kPending>
LORA_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until the writes of all groups of this thread are visible to it; `.read` would not do.
LORA_DEVICE void tma_store_wait_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// --- Warpgroup matrix multiply -------------------------------------------------------------------

LORA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LORA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
LORA_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving a use of accumulators above the wait that makes them valid.
template <int kCount>
LORA_DEVICE void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kRegisters>
LORA_DEVICE void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
LORA_DEVICE void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- Elements ------------------------------------------------------------------------------------

// Rounds two numbers to the nearest element, ties to even; `low` lands in the low half.
template <class Element>
LORA_DEVICE uint32_t pack(float low, float high);

template <>
LORA_DEVICE uint32_t pack<Bf16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
LORA_DEVICE uint32_t pack<Fp16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <class Element>
LORA_DEVICE float unpack(uint16_t bits);

template <>
LORA_DEVICE float unpack<Bf16>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

template <>
LORA_DEVICE float unpack<Fp16>(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

}  // namespace ptx
}  // namespace lora
