// SPDX-License-Identifier: Apache-2.0
//
// Hopper's asynchronous instructions by name: mbarrier, TMA, wgmma; approximations. One PTX
// instruction each, which the comment names; sm_90a where it says so. Shared memory is addressed by
// 32-bit addresses of the .shared window, what shared_address returns.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/weight.h"

namespace slope::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier ------------------------------------------------------------------------------
//
// A barrier of 8 bytes counts arrivals, and bytes that TMA has yet to write. When both are done its
// phase ends. wait(barrier, p) returns once the phase of parity p has ended; a fresh barrier is in
// its phase of parity 0, so that waiting for parity 1 returns at once.

// mbarrier.init
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: the inits of this thread, for TMA. A barrier of the block must follow.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.arrive at the barrier in the same place of block `block` of the cluster. Its scope is
// the block: nothing that this thread wrote is to be seen by the other, and the scope of the
// cluster would have it wait for its stores.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int block) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

// mbarrier.arrive.expect_tx: arrives, and `bytes` are to come.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity, until it says yes.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- shared memory of a cluster --------------------------------------------------------------

// mapa: where block `block` of the cluster has what this block has at `shared`.
__device__ __forceinline__ uint32_t address_in(uint32_t shared, int block) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(block));
  return address;
}

// ld.shared::cluster.v4, of any block; after a cluster_sync that follows the store.
__device__ __forceinline__ float4 load_from_cluster(uint32_t address) {
  float4 four;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "r"(address)
               : "memory");
  return four;
}

// st.shared.v4, into this block's.
__device__ __forceinline__ void store_shared(uint32_t address, float4 four) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(four.x), "f"(four.y),
               "f"(four.z), "f"(four.w)
               : "memory");
}

// ---- barriers --------------------------------------------------------------------------------

// bar.sync of some of the block's threads; id 0 is __syncthreads.
template <int kThreads>
__device__ __forceinline__ void named_barrier_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// barrier.cluster.arrive, barrier.cluster.wait: all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// ---- TMA -----------------------------------------------------------------------------------
//
// A tensor map holds address, sizes, box and swizzle. The box at (column, row) may reach beyond the
// tensor: loads fill with zeros (and count all bytes), stores leave out.

// prefetch.tensormap
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor.2d, global -> shared; the barrier hears of every byte.
__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap* map, int column,
                                         int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same with .multicast::cluster: to the same place in every block of `blocks`, a bit mask, and
// each block's barrier there hears of it.
__device__ __forceinline__ void tma_load_multicast(uint32_t shared, const CUtensorMap* map,
                                                   int column, int row, uint32_t barrier,
                                                   uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// cp.async.bulk.tensor.2d, shared -> global, into the thread's open bulk group.
__device__ __forceinline__ void tma_store(uint32_t shared, const CUtensorMap* map, int column,
                                          int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%1, {%2, %3}], [%0];" ::"r"(
          shared),
      "l"(map), "r"(column), "r"(row)
      : "memory");
}

// cp.async.bulk.commit_group
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// cp.async.bulk.wait_group.read: all but the latest kPending groups have read shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// cp.async.bulk.wait_group: all but the latest kPending groups are written.
template <int kPending>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// fence.proxy.async: what this thread stored in shared memory, for TMA and wgmma.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- registers and plain memory ------------------------------------------------------------

// setmaxnreg.inc, setmaxnreg.dec (sm_90a), by whole warpgroups.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ld.global.v4, not kept in L1.
__device__ __forceinline__ void load_once(uint32_t (&words)[4], const uint4* address) {
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(address));
}

// stmatrix.trans of two or four 8 x 8 matrices of 16-bit elements: lane l gives the address of
// column l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices_t(uint32_t shared, uint32_t m0, uint32_t m1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared),
               "r"(m0), "r"(m1)
               : "memory");
}
__device__ __forceinline__ void store_matrices_t(uint32_t shared, uint32_t m0, uint32_t m1,
                                                 uint32_t m2, uint32_t m3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(m0), "r"(m1), "r"(m2), "r"(m3)
      : "memory");
}

// ---- arithmetic ----------------------------------------------------------------------------

// 2^x, to 2 ulp.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x, to 1 ulp.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ---- wgmma (sm_90a) ------------------------------------------------------------------------
//
// By whole warpgroups, both operands in shared memory, K-major (a dense A may be M-major).
// Accumulators, fp32 [64, kN]: warp w has rows 16w to 16w+15; lane 4g+t has of columns 8j+2t,
// 8j+2t+1 in d[4j], d[4j+1] row g and in d[4j+2], d[4j+3] row g+8.

// wgmma.fence: before the first multiplication, and after other accesses to its registers.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group: all but the latest kPending groups are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: the compiler may not read sums before this, as it may before a wait.
template <int kCount>
__device__ __forceinline__ void wgmma_keep_after(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(sums[i])::"memory");
  }
}

// Matrix descriptor of a tile whose rows are one swizzle span wide, 64 or 128 bytes, and follow
// each other: bits 0-13 address / 16, 16-29 unused with swizzle, 32-45 bytes of 8 rows / 16, 62-63
// the swizzle. To go n bytes on add n / 16: along K-major rows, or n / kSpanBytes rows of K.
template <int kSpanBytes>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared) {
  static_assert(kSpanBytes == 64 || kSpanBytes == 128);
  constexpr uint64_t kSwizzle = kSpanBytes == 128 ? 1 : 2;
  constexpr uint64_t kFixed = kSwizzle << 62 | uint64_t{8 * kSpanBytes / 16} << 32 | 1 << 16;
  return kFixed | (shared & 0x3ffff) >> 4;
}

// sparse<s>   wgmma.mma_async.sp m64nNk32: d = A B^T [+ d if accumulate]; A [64, 32] as 16 values a
//             row. Of the four lanes with the same g, lanes 2s and 2s+1 supply the metadata, for
//             columns 0-15 and 16-31: low half row g, high half row g+8, a nibble a group.
// dense<t>    wgmma.mma_async m64nNk16: d += A B^T; A [64, 16] as rows of 16 or, t = 1, as its
//             transpose, 16 rows of 64 (128 bytes, eight of them a swizzle pattern)
template <FloatKind kKind, int kN>
struct Wgmma;

// "%t0, ..., %t9", of which the first decade is SLOPE_DECADE()
#define SLOPE_DECADE(t)                                                                            \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9"
#define SLOPE_DECADES_3 SLOPE_DECADE() ", " SLOPE_DECADE(1) ", " SLOPE_DECADE(2)
#define SLOPE_DECADES_6 \
  SLOPE_DECADES_3 ", " SLOPE_DECADE(3) ", " SLOPE_DECADE(4) ", " SLOPE_DECADE(5)
#define SLOPE_DECADES_8 SLOPE_DECADES_6 ", " SLOPE_DECADE(6) ", " SLOPE_DECADE(7)
#define SLOPE_NAMES_32 SLOPE_DECADES_3 ", %30, %31"
#define SLOPE_NAMES_64 SLOPE_DECADES_6 ", %60, %61, %62, %63"
#define SLOPE_NAMES_76 SLOPE_DECADES_6 ", " SLOPE_DECADE(6) ", %70, %71, %72, %73, %74, %75"
#define SLOPE_NAMES_80 SLOPE_DECADES_8
#define SLOPE_NAMES_84 SLOPE_DECADES_8 ", %80, %81, %82, %83"
#define SLOPE_NAMES_88 SLOPE_NAMES_84 ", %84, %85, %86, %87"
#define SLOPE_NAMES_96 SLOPE_DECADES_8 ", " SLOPE_DECADE(8) ", %90, %91, %92, %93, %94, %95"
#define SLOPE_NAMES_128                                                        \
  SLOPE_DECADES_8 ", " SLOPE_DECADE(8) ", " SLOPE_DECADE(9) ", " SLOPE_DECADE( \
      10) ", " SLOPE_DECADE(11) ", %120, %121, %122, %123, %124, %125, %126, %127"

#define SLOPE_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define SLOPE_D16(i) SLOPE_D4(i), SLOPE_D4((i) + 4), SLOPE_D4((i) + 8), SLOPE_D4((i) + 12)
#define SLOPE_D32 SLOPE_D16(0), SLOPE_D16(16)
#define SLOPE_D64 SLOPE_D32, SLOPE_D16(32), SLOPE_D16(48)
#define SLOPE_D76 SLOPE_D64, SLOPE_D4(64), SLOPE_D4(68), SLOPE_D4(72)
#define SLOPE_D80 SLOPE_D64, SLOPE_D16(64)
#define SLOPE_D84 SLOPE_D80, SLOPE_D4(80)
#define SLOPE_D88 SLOPE_D84, SLOPE_D4(84)
#define SLOPE_D96 SLOPE_D64, SLOPE_D16(64), SLOPE_D16(80)
#define SLOPE_D128 SLOPE_D96, SLOPE_D16(96), SLOPE_D16(112)

// n = kN / 2 registers; a to s the operands after them, n to n + 4.
#define SLOPE_WGMMA(kind, type, kN, n, a, b, e, p, s)                                             \
  template <>                                                                                     \
  struct Wgmma<FloatKind::kind, kN> {                                                             \
    template <int kSelector>                                                                      \
    static __device__ __forceinline__ void sparse(float (&d)[n], uint64_t values, uint64_t dense, \
                                                  uint32_t metadata, int accumulate) {            \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #p                      \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sp.sync.aligned.m64n" #kN "k32.f32." type "." type            \
                   " {" SLOPE_NAMES_##n "}, %" #a ", %" #b ", %" #e ", %" #s                      \
                                        ", accumulate, 1, 1, 0, 0;\n}"                            \
                   : SLOPE_D##n                                                                   \
                   : "l"(values), "l"(dense), "r"(metadata), "r"(accumulate), "n"(kSelector));    \
    }                                                                                             \
    template <int kTransposed>                                                                    \
    static __device__ __forceinline__ void dense(float (&d)[n], uint64_t left, uint64_t right) {  \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type               \
                   " {" SLOPE_NAMES_##n "}, %" #a ", %" #b ", 1, 1, 1, %" #e ", 0;"               \
                   : SLOPE_D##n                                                                   \
                   : "l"(left), "l"(right), "n"(kTransposed));                                    \
    }                                                                                             \
  };
#define SLOPE_WGMMA_BOTH(kN, n, a, b, e, p, s)    \
  SLOPE_WGMMA(kHalf, "f16", kN, n, a, b, e, p, s) \
  SLOPE_WGMMA(kBFloat16, "bf16", kN, n, a, b, e, p, s)

SLOPE_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36)
SLOPE_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68)
SLOPE_WGMMA_BOTH(152, 76, 76, 77, 78, 79, 80)
SLOPE_WGMMA_BOTH(160, 80, 80, 81, 82, 83, 84)
SLOPE_WGMMA_BOTH(168, 84, 84, 85, 86, 87, 88)
SLOPE_WGMMA_BOTH(176, 88, 88, 89, 90, 91, 92)
SLOPE_WGMMA_BOTH(192, 96, 96, 97, 98, 99, 100)
SLOPE_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132)

#undef SLOPE_WGMMA_BOTH
#undef SLOPE_WGMMA
#undef SLOPE_D4
#undef SLOPE_D16
#undef SLOPE_D32
#undef SLOPE_D64
#undef SLOPE_D76
#undef SLOPE_D80
#undef SLOPE_D84
#undef SLOPE_D88
#undef SLOPE_D96
#undef SLOPE_D128
#undef SLOPE_NAMES_32
#undef SLOPE_NAMES_64
#undef SLOPE_NAMES_76
#undef SLOPE_NAMES_80
#undef SLOPE_NAMES_84
#undef SLOPE_NAMES_88
#undef SLOPE_NAMES_96
#undef SLOPE_NAMES_128
#undef SLOPE_DECADES_3
#undef SLOPE_DECADES_6
#undef SLOPE_DECADES_8
#undef SLOPE_DECADE

}  // namespace slope::ptx
