// SPDX-License-Identifier: Apache-2.0
//
// spmm_sm90:  y = activation(x W^T [+ tail_x tail_weight^T] [+ bias]),  W 2:4, 16-bit types, fp32
// sums; the activation is none, ReLU or SwiGLU (common/activation.h)
//
// To the tensor cores W is the left operand, wgmma.mma_async.sp m64nNk32, so a tile of Y lies
// transposed in the accumulators: rows are features of Y (rows of W), columns are tokens.
//
// Ownership. Without segments a block for each multiprocessor: blocks, or clusters of two or four,
// one below the other, take tiles of Y in turns, a block kRows features x kTokens tokens. It has
// three warpgroups:
//
//   warpgroup 0       one thread of it fills the ring by TMA; the rest is idle
//   warpgroups 1, 2   kBlocks times 64 features each, all tokens of the tile; warp w of one has
//                     features 16w to 16w+15 of every 64
//
// Ring. A stage is 64 columns of W and X, or then 32 of the tail's factors (whose X part is half
// as large). It is full when TMA has written its bytes, empty when both warpgroups have done its
// wgmma, in a cluster those of all blocks; each has the wgmma of one stage under way while it
// issues those of the next.
//
//            full: 1 arrival + bytes                    empty: 2 arrivals from each block
//   TMA ---> | stage 0 | stage 1 | ... | stage n-1 | ---> wgmma
//            | values kRows x 32, 64-byte swizzle  |
//            | x    kTokens x 64, 128-byte swizzle |
//
// Of the tail's factors kRows x 32 and kTokens x 32, 64-byte swizzle; of a transposed one, for each
// 64 rows of W, 32 of the rank x 64, 128-byte swizzle: as many bytes.
//
// Metadata goes from global memory to registers, four stages ahead, before a tile ends already for
// the next one: see Metadata.
//
// Segments. Where tiles are too few for the multiprocessors, W's columns are cut into two to four
// segments: a block each, a cluster for a tile. Each block multiplies its own; then it leaves the
// sums that others store where its ring was, reads from their shared memory those that it stores,
// and adds them, so that they are always added in the same order:
//
//                   two segments      three segments              four segments
//                   tokens 0 .. 127   tokens 0 .. 63  64 .. 127   tokens 0 .. 63  64 .. 127
//   rows  0 ..  63  block 0 stores    block 0         block 0     block 0         block 1
//   rows 64 .. 127  block 1           block 1         block 2     block 2         block 3
//
// (of 64 tokens, which are one chunk: as here with tokens 0 .. 63, and the other blocks none)
//
// Output. By chunks of 64 rows of W x 64 tokens: bias, activation, conversion, stmatrix.trans into
// one of four buffers of 8 KB (a token a row, 128-byte swizzle), TMA store; two chunks at a time,
// so that barriers are few. The ring fills meanwhile. A thread holds rows g and g + 8 of W: with
// SwiGLU a gate and its partner. They make one feature, so that a token is a row of 64 bytes, with
// 64-byte swizzle.
//
// Work of a stage with tile 256 x 192: 2 * 256 * 192 * 64 = 6.3 MFLOP of the dense product, in 768
// clocks of the tensor cores; 16 KB of values, 2 KB of metadata and 24 KB of x in. Each of its
// eight wgmma reads 2 KB of values and 12 KB of x from shared memory, at 128 bytes a clock: 896
// clocks.
//
// Preconditions, which the launcher checks: as in SpmmSm90Params, columns > 0, tokens > 0, rows >
// 0; with segments as many clusters as tiles. Sizes need not be multiples of the tile: of rows and
// tokens only what there is is loaded (Loads), beyond the columns TMA reads zeros, and it leaves
// out what is beyond Y. With an odd number of atoms the last stage's second half is such zeros.
#pragma once

#include <type_traits>
#include <utility>

#include "common/element.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "ops/spmm_sm90_args.h"

namespace slope {
namespace sm90 {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kSteps = kSm90TileColumns / kSm90AtomColumns;
static_assert(kSteps == 2, "the two selectors of a metadata word");
constexpr int kQuad = kSm90QuadColumns / kSm90TileColumns;  // stages whose metadata stands together
static_assert(kQuad == 4, "words of a 16-byte load");

// 65536 registers: 128 * 24 + 256 * 240 = 64512, with segments 128 * 56 + 256 * 224 = 64512
template <int kSegments>
constexpr int kProducerRegisters = kSegments == 1 ? 24 : 56;
template <int kSegments>
constexpr int kConsumerRegisters = kSegments == 1 ? 240 : 224;

constexpr int kElementBytes = 2;
constexpr int kValueRowBytes = kSm90TileColumns / 2 * kElementBytes;  // 64
constexpr int kXRowBytes = kSm90TileColumns * kElementBytes;          // 128
constexpr int kTailRowBytes = kSm90TailTileColumns * kElementBytes;   // 64
static_assert(kTailRowBytes == kValueRowBytes);  // blocks of 64 rows are as far apart
static_assert(kTailRowBytes <= kXRowBytes);
constexpr int kOutRowBytes = kSm90OutBox * kElementBytes;  // 128
constexpr int kGatedRowBytes = kOutRowBytes / 2;
constexpr int kOutBytes = kSm90OutBox * kOutRowBytes;
constexpr int kOutBuffers = 4;          // of each consumer
constexpr int kOutTogether = 2;         // chunks, at most, that are written, then stored, together
constexpr int kSharedAlignment = 1024;  // of the 128-byte swizzle
constexpr int kMaxSharedBytes = 227 * 1024;

// kBlocks: m64 accumulators of a consumer. kTokens: N of the wgmma. kCluster: blocks, one below the
// other, that share tiles of X. kSegments: of W's columns; those of a tile are done by as many
// blocks, a cluster, which then add up their sums.
template <int kBlocks_, int kTokens_, int kStages_, int kCluster_, int kSegments_>
struct Tile {
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kSegments = kSegments_;
  static constexpr int kClusterBlocks = kCluster * kSegments;
  static constexpr int kRows = kConsumers * kBlocks * kSm90BlockRows;
  static constexpr int kOutChunks = (kTokens + kSm90OutBox - 1) / kSm90OutBox;
  static constexpr int kRestTokens = kTokens % kSm90OutBox;  // of the last chunk, 0: whole

  // Shared memory, from the first multiple of kSharedAlignment
  static constexpr int kValueBytes = kRows * kValueRowBytes;
  static constexpr int kXBytes = kTokens * kXRowBytes;
  static constexpr int kX = 0;
  static constexpr int kValues = kX + kStages * kXBytes;
  static constexpr int kOut = kValues + kStages * kValueBytes;
  static constexpr int kFull = kOut + kConsumers * kOutBuffers * kOutBytes;
  static constexpr int kEmpty = kFull + kStages * 8;
  static constexpr int kSharedBytes = kEmpty + kStages * 8 + kSharedAlignment;
  static_assert(kXBytes % kSharedAlignment == 0 && kValueBytes % kSharedAlignment == 0);
  static_assert(kTokens % 8 == 0 && kSharedBytes <= kMaxSharedBytes);
  static_assert(kBlocks * kTokens / 2 + 40 <= kConsumerRegisters<kSegments>);

  // Sums of segments lie where the ring was, 64 rows x 64 tokens together
  static_assert(kSegments == 1 || (kCluster == 1 && kBlocks == 1 && kRestTokens == 0));
  static_assert(kSegments == 1 || kRows * kTokens * 4 <= kOut);
};

// ---- metadata ----------------------------------------------------------------------------

// Words of a quad of stages, for the kBlocks blocks of 64 rows of a consumer. Sparse wgmma takes
// one word from each lane for the two k32 steps of a stage; docs/layouts.md draws which, and that
// the four words of a quad stand together.
template <int kBlocks>
struct Metadata {
  uint32_t word[kBlocks][kQuad];

  // Starts the loads of quad `quad` of blocks `block` on. Blocks beyond W read the last.
  __device__ __forceinline__ void load(const SpmmSm90Args& args, int block, int quad, int thread) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int64_t place = int64_t{min(block + i, args.row_blocks - 1)} * args.quads + quad;
      ptx::load_once(word[i], args.metadata + place * kWarpgroup + thread);
    }
  }
};

// ---- order of tiles, ring ----------------------------------------------------------------

template <typename T>
__device__ __forceinline__ int block_of_cluster() {
  return T::kCluster == 1 ? 0 : blockIdx.x % T::kCluster;
}

// Which segment of W's columns this block does.
template <int kSegments>
__device__ __forceinline__ int segment_of() {
  return kSegments == 1 ? 0 : blockIdx.x % kSegments;
}

// The stages of a block: along W's columns from first() to end(), whole quads in a segment; and of
// the tail from tail_first() to tail_end(). Quads are dealt out by rounding up, tail stages by
// rounding down, so that of equal counts a segment with a quad less has a tail stage more.
template <int kSegments>
class Stages {
 public:
  __device__ __forceinline__ explicit Stages(const SpmmSm90Args& args)
      : first_(stage_of(args, segment_of<kSegments>())),
        end_(stage_of(args, segment_of<kSegments>() + 1)),
        tail_first_(args.tail_tiles * segment_of<kSegments>() / kSegments),
        tail_end_(args.tail_tiles * (segment_of<kSegments>() + 1) / kSegments) {}

  __device__ __forceinline__ int first() const { return first_; }
  __device__ __forceinline__ int end() const { return end_; }
  __device__ __forceinline__ int tail_first() const { return tail_first_; }
  __device__ __forceinline__ int tail_end() const { return tail_end_; }
  __device__ __forceinline__ int quads() const { return (end_ + kQuad - 1) / kQuad; }

 private:
  __device__ __forceinline__ static int stage_of(const SpmmSm90Args& args, int segment) {
    const int64_t quad = (int64_t{args.quads} * segment + kSegments - 1) / kSegments;
    return min(static_cast<int>(quad) * kQuad, args.k_tiles);
  }

  int first_, end_, tail_first_, tail_end_;
};

// Without segments they are arguments: the sums leave no registers to keep them in.
template <>
class Stages<1> {
 public:
  __device__ __forceinline__ explicit Stages(const SpmmSm90Args& args) : args_(args) {}

  __device__ __forceinline__ int first() const { return 0; }
  __device__ __forceinline__ int end() const { return args_.k_tiles; }
  __device__ __forceinline__ int tail_first() const { return 0; }
  __device__ __forceinline__ int tail_end() const { return args_.tail_tiles; }
  __device__ __forceinline__ int quads() const { return args_.quads; }

 private:
  const SpmmSm90Args& args_;
};

struct TilePlace {
  int row, token;  // this block's first
};

// The tiles of a cluster, one under the other, count as one here. They go in groups along features;
// in one, features before tokens. Clusters that run at the same time then share tiles of W and of X
// in L2.
template <typename T>
__device__ __forceinline__ TilePlace place_of(const SpmmSm90Args& args, int tile) {
  const int group = divide(tile, args.group_tiles);
  const int in_group = tile - group * static_cast<int>(args.group_tiles.value);
  const int first = group * static_cast<int>(args.group_height.value);
  const bool last = first + static_cast<int>(args.group_height.value) >= args.row_tiles;
  const Divisor& height = last ? args.last_height : args.group_height;
  const int token_tile = divide(in_group, height);
  const int row_tile = first + in_group - token_tile * static_cast<int>(height.value);
  return {(row_tile * T::kCluster + block_of_cluster<T>()) * T::kRows, token_tile * T::kTokens};
}

template <typename T>
struct Ring {
  uint32_t shared;  // start of the block's shared memory
  int stage = 0;
  uint32_t round = 0;  // parity of the times that the ring was gone through

  __device__ __forceinline__ uint32_t full(int s) const { return shared + T::kFull + s * 8; }
  __device__ __forceinline__ uint32_t empty(int s) const { return shared + T::kEmpty + s * 8; }
  __device__ __forceinline__ uint32_t x() const { return shared + T::kX + stage * T::kXBytes; }
  __device__ __forceinline__ uint32_t values() const {
    return shared + T::kValues + stage * T::kValueBytes;
  }
  __device__ __forceinline__ void advance() {
    if (++stage == T::kStages) {
      stage = 0;
      round ^= 1;
    }
  }
};

// ---- producer ----------------------------------------------------------------------------

// What stages of a tile load of W and X, or of the tail's factors: the rows of W that there are,
// and the tokens, to whole swizzle patterns of eight for each block. What wgmma reads beyond them
// is what was there before, and goes to sums that are not stored.
template <typename T, bool kIsTail>
class Loads {
  static constexpr int kWeightBytes = kIsTail ? kTailRowBytes : kValueRowBytes;  // of a row
  static constexpr int kXBytes = kIsTail ? kTailRowBytes : kXRowBytes;

 public:
  __device__ __forceinline__ Loads(const SpmmSm90Args& args, TilePlace place) {
    const int rows = max(0, min(T::kRows, args.rows - place.row));
    const int tokens = min(T::kTokens, (args.tokens - place.token + 7) / 8 * 8);
    const int part = sm90_x_part(tokens, T::kCluster);
    const bool cuts_w = rows < T::kRows, cuts_x = tokens < T::kTokens;
    weight_ =
        kIsTail ? &args.tail_weight[cuts_w && !args.tail_is_transposed] : &args.values[cuts_w];
    x_ = kIsTail ? &args.tail_x[cuts_x] : &args.x[cuts_x];
    row_ = place.row;
    // This block's part of the tokens, which goes to all of the cluster. The last part ends with
    // the tokens, so that it may repeat some of the one before
    first_ = T::kCluster == 1 ? 0 : min(block_of_cluster<T>() * part, tokens - part);
    token_ = place.token + first_;
    const bool in_blocks = kIsTail && args.tail_is_transposed;
    const int weight_rows =
        in_blocks ? (rows + kSm90BlockRows - 1) / kSm90BlockRows * kSm90BlockRows : rows;
    bytes_ = weight_rows * kWeightBytes + T::kCluster * part * kXBytes;
  }

  // A stage, from these columns on.
  __device__ __forceinline__ void load(const SpmmSm90Args& args, const Ring<T>& ring,
                                       int weight_column, int x_column) const {
    const uint32_t full = ring.full(ring.stage);
    ptx::barrier_arrive_expect(full, bytes_);
    if (kIsTail && args.tail_is_transposed) {  // by blocks of 64 rows, a box each
#pragma unroll
      for (int row = 0; row < T::kRows; row += kSm90BlockRows) {
        if (row_ + row < args.rows) {
          ptx::tma_load(ring.values() + row * kTailRowBytes, args.tail_weight, row_ + row,
                        weight_column, full);
        }
      }
    } else if (row_ < args.rows) {  // a tile beyond W has none
      ptx::tma_load(ring.values(), weight_, weight_column, row_, full);
    }
    if constexpr (T::kCluster == 1) {
      ptx::tma_load(ring.x(), x_, x_column, token_, full);
    } else {
      ptx::tma_load_multicast(ring.x() + first_ * kXBytes, x_, x_column, token_, full,
                              (1 << T::kCluster) - 1);
    }
  }

 private:
  const CUtensorMap *weight_, *x_;
  int row_, token_;
  int first_;  // token of the tile that this block loads
  int bytes_;  // that a block's stage gets
};

template <typename T>
__device__ __forceinline__ void produce(const SpmmSm90Args& args, uint32_t shared) {
  Ring<T> ring{shared};
  const Stages<T::kSegments> stages(args);
  const int clusters = gridDim.x / T::kClusterBlocks;
  const int tiles = args.row_tiles * args.token_tiles;
  for (int tile = blockIdx.x / T::kClusterBlocks; tile < tiles; tile += clusters) {
    const TilePlace place = place_of<T>(args, tile);
    const Loads<T, false> loads(args, place);
    for (int k_tile = stages.first(); k_tile < stages.end(); ++k_tile) {
      ptx::barrier_wait(ring.empty(ring.stage), ring.round ^ 1);
      loads.load(args, ring, k_tile * (kSm90TileColumns / 2), k_tile * kSm90TileColumns);
      ring.advance();
    }
    const Loads<T, true> tail_loads(args, place);
    for (int k_tile = stages.tail_first(); k_tile < stages.tail_end(); ++k_tile) {
      ptx::barrier_wait(ring.empty(ring.stage), ring.round ^ 1);
      tail_loads.load(args, ring, k_tile * kSm90TailTileColumns, k_tile * kSm90TailTileColumns);
      ring.advance();
    }
  }
}

// ---- segments ----------------------------------------------------------------------------

// Whether this block stores a chunk of 64 tokens of a consumer's 64 rows: it alone of its cluster.
template <typename T>
__device__ __forceinline__ bool stores(int consumer, int chunk) {
  if constexpr (T::kSegments == 1) {
    return true;
  } else {
    const int number = consumer * T::kOutChunks + chunk;
    return number * T::kSegments / (kConsumers * T::kOutChunks) == segment_of<T::kSegments>();
  }
}

// Adds up the segments of a tile with `tokens` tokens. A block leaves in its shared memory what
// others store, an octet of tokens of a thread in a float4; and adds to its own what they left, in
// the order of the segments. By both consumers; a cluster_sync is in it.
template <typename T>
__device__ __forceinline__ void add_segments(float (&sums)[T::kTokens / 2], int tokens,
                                             uint32_t shared, int consumer, int thread) {
  constexpr int kOctets = kSm90OutBox / 8;  // of a chunk
  constexpr uint32_t kOctetBytes = kWarpgroup * sizeof(float4);
  const auto place_of_chunk = [&](int chunk) {
    return shared + (consumer * T::kOutChunks + chunk) * kOctets * kOctetBytes +
           thread * static_cast<uint32_t>(sizeof(float4));
  };

  ptx::named_barrier_sync<kConsumers * kWarpgroup>(1 + kConsumers);  // the ring is read to its end
#pragma unroll
  for (int chunk = 0; chunk < T::kOutChunks; ++chunk) {
    if (chunk * kSm90OutBox < tokens && !stores<T>(consumer, chunk)) {
      const uint32_t place = place_of_chunk(chunk);
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        const float* const four = sums + (chunk * kOctets + i) * 4;
        ptx::store_shared(place + i * kOctetBytes, {four[0], four[1], four[2], four[3]});
      }
    }
  }
  ptx::cluster_sync();
#pragma unroll
  for (int chunk = 0; chunk < T::kOutChunks; ++chunk) {
    if (chunk * kSm90OutBox < tokens && stores<T>(consumer, chunk)) {
#pragma unroll 1
      for (int segment = 0; segment < T::kSegments; ++segment) {
        if (segment == segment_of<T::kSegments>()) {
          continue;
        }
        const uint32_t place = ptx::address_in(place_of_chunk(chunk), segment);
        float4 others[kOctets];
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
          others[i] = ptx::load_from_cluster(place + i * kOctetBytes);
        }
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
          float* const four = sums + (chunk * kOctets + i) * 4;
          four[0] += others[i].x;
          four[1] += others[i].y;
          four[2] += others[i].z;
          four[3] += others[i].w;
        }
      }
    }
  }
}

// ---- output ------------------------------------------------------------------------------

// silu(gate) * up for two elements, with one reciprocal of 1 + e^-gate for both. The exponential is
// held below 2^60, so that their product is finite and neither gets the other's infinity or NaN (it
// may round otherwise beside one); below a gate of -41 the result is thus up to 2^-60 |gate * up|
// off. NaN stays NaN; a gate of -inf gives an infinity, as does one of inf.
__device__ __forceinline__ void swiglu_pair(float gate0, float gate1, float up0, float up1,
                                            float (&result)[2]) {
  constexpr float kLog2E = 1.44269504f;
  const float below0 = 1.0f + ptx::exp2_approx(fminf(gate0 * -kLog2E, 60.0f));
  const float below1 = 1.0f + ptx::exp2_approx(fminf(gate1 * -kLog2E, 60.0f));
  const float reciprocal = ptx::reciprocal_approx(below0 * below1);
  result[0] = gate0 * (below1 * reciprocal) * up0;
  result[1] = gate1 * (below0 * reciprocal) * up1;
}

// One chunk of 64 rows of W x 64 tokens into a buffer; of its octets of tokens, `octets` exist.
// `sums` starts with the chunk's: of octet i, sums[4i], sums[4i + 1] are two tokens of this
// thread's first row of W, sums[4i + 2], sums[4i + 3] of its second. All indices are known at
// compile time.
template <FloatKind kKind, bool kRelu>
__device__ __forceinline__ void write_chunk(uint32_t out, const float* sums, int octets,
                                            const float (&bias)[2], int thread) {
  const int lane = thread % 32;
  // stmatrix: lanes 0-7 and 8-15 address eight tokens, features 0-7 and 8-15 of the warp's 16;
  // lanes 16-31 the next eight tokens
  const int lane_token = lane / 16 * 8 + lane % 8;
  const int out_chunk = thread / 32 * 2 + lane / 8 % 2;  // of 16 bytes
  const uint32_t lane_offset = lane_token * kOutRowBytes + ((out_chunk ^ lane % 8) * 16);
  const auto word = [&](int octet, int half) {
    const float* const pair = sums + octet * 4 + half * 2;
    return pack_pair<kKind, kRelu>(pair[0] + bias[half], pair[1] + bias[half]);
  };
#pragma unroll
  for (int octet = 0; octet < kSm90OutBox / 8; octet += 2) {
    const uint32_t address = out + lane_offset + octet * 8 * kOutRowBytes;
    if (octet + 1 < octets) {
      ptx::store_matrices_t(address, word(octet, 0), word(octet, 1), word(octet + 1, 0),
                            word(octet + 1, 1));
    } else if (octet < octets) {
      ptx::store_matrices_t(address, word(octet, 0), word(octet, 1));
    }
  }
}

// The same with SwiGLU: 32 features.
template <FloatKind kKind>
__device__ __forceinline__ void write_gated_chunk(uint32_t out, const float* sums, int octets,
                                                  const float (&bias)[2], int thread) {
  // stmatrix: a lane addresses a token of 32, the warp's eight features of it
  const int lane = thread % 32;
  const int out_chunk = thread / 32;  // of 16 bytes
  const uint32_t lane_out = out + lane * kGatedRowBytes + ((out_chunk ^ lane / 2 % 4) * 16);
  const auto word = [&](int octet) -> uint32_t {
    if (octet >= octets) {
      return 0;  // of the buffer, but not stored
    }
    const float* const four = sums + octet * 4;
    float pair[2];
    swiglu_pair(four[0] + bias[0], four[1] + bias[0], four[2] + bias[1], four[3] + bias[1], pair);
    return pack_pair<kKind, false>(pair[0], pair[1]);
  };
#pragma unroll
  for (int octet = 0; octet < kSm90OutBox / 8; octet += 4) {
    if (octet < octets) {
      ptx::store_matrices_t(lane_out + octet * 8 * kGatedRowBytes, word(octet), word(octet + 1),
                            word(octet + 2), word(octet + 3));
    }
  }
}

// A consumer's part of a tile, from `place` on, by chunks: those of its first 64 rows, then those
// of its second.
template <FloatKind kKind, typename T, Activation kActivation>
__device__ __forceinline__ void store_sums(const SpmmSm90Args& args,
                                           const float (&sums)[T::kBlocks][T::kTokens / 2],
                                           TilePlace place, uint32_t buffers, int consumer,
                                           int thread) {
  constexpr bool kGated = kActivation == Activation::kSwiglu;
  constexpr int kChunks = T::kBlocks * T::kOutChunks;
  constexpr int kTogether = kOutTogether < kChunks ? kOutTogether : kChunks;
  // A shorter group of chunks comes last, so never where buffers are used again
  static_assert(kOutBuffers % kTogether == 0);
  static_assert(kChunks % kTogether == 0 || kChunks <= kOutBuffers);
  const auto row_of = [&](int chunk) { return place.row + chunk / T::kOutChunks * kSm90BlockRows; };
  const auto token_of = [&](int chunk) {
    return place.token + chunk % T::kOutChunks * kSm90OutBox;
  };
  const auto is_stored = [&](int chunk) {
    return row_of(chunk) < args.rows && token_of(chunk) < args.tokens &&
           stores<T>(consumer, chunk % T::kOutChunks);
  };

  float bias[T::kBlocks][2] = {};  // of this thread's two rows
  if (args.bias != nullptr) {
    const auto* const biases = static_cast<const typename ElementOf<kKind>::Type*>(args.bias);
#pragma unroll
    for (int i = 0; i < 2 * T::kBlocks; ++i) {
      const int row =
          place.row + i / 2 * kSm90BlockRows + thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
      bias[i / 2][i % 2] = row < args.rows ? static_cast<float>(biases[row]) : 0.0f;
    }
  }

#pragma unroll
  for (int first = 0; first < kChunks; first += kTogether) {
    // The buffers are free once the stores of the tile before, or of this, have read them
    const bool is_used = first + kTogether > kOutBuffers;
    if (first == 0 || is_used) {
      if (thread == 0) {
        if (is_used) {
          ptx::tma_store_wait_read<kOutBuffers / kTogether - 1>();
        } else {
          ptx::tma_store_wait_read<0>();
        }
      }
      ptx::named_barrier_sync<kWarpgroup>(1 + consumer);
    }

    const auto buffer_of = [&](int chunk) { return buffers + chunk % kOutBuffers * kOutBytes; };
    const int end = min(first + kTogether, kChunks);
#pragma unroll
    for (int chunk = first; chunk < end; ++chunk) {
      constexpr int kChunkOctets = kSm90OutBox / 8;
      const int i = chunk / T::kOutChunks;
      const int octet = chunk % T::kOutChunks * kChunkOctets;
      const int octets = min(kChunkOctets, T::kTokens / 8 - octet);
      if (is_stored(chunk)) {
        if constexpr (kGated) {
          write_gated_chunk<kKind>(buffer_of(chunk), sums[i] + octet * 4, octets, bias[i], thread);
        } else {
          write_chunk<kKind, kActivation == Activation::kRelu>(
              buffer_of(chunk), sums[i] + octet * 4, octets, bias[i], thread);
        }
      }
    }
    ptx::fence_async_shared();
    ptx::named_barrier_sync<kWarpgroup>(1 + consumer);
    if (thread == 0) {
#pragma unroll
      for (int chunk = first; chunk < end; ++chunk) {
        if (is_stored(chunk)) {
          const bool is_rest = T::kRestTokens != 0 && chunk % T::kOutChunks == T::kOutChunks - 1;
          ptx::tma_store(buffer_of(chunk), is_rest ? &args.y_rest : &args.y,
                         kGated ? row_of(chunk) / 2 : row_of(chunk), token_of(chunk));
        }
      }
      ptx::tma_store_commit();  // of nothing too: groups are counted
    }
  }
}

// ---- consumers ---------------------------------------------------------------------------

template <FloatKind kKind, typename T, Activation kActivation>
__device__ __forceinline__ void consume(const SpmmSm90Args& args, uint32_t shared, int consumer,
                                        int thread) {
  using Wgmma = ptx::Wgmma<kKind, T::kTokens>;
  constexpr int kBlocks = T::kBlocks;
  constexpr uint64_t kValueStep = kValueRowBytes / kSteps / 16;  // in a matrix descriptor
  constexpr uint64_t kXStep = kXRowBytes / kSteps / 16;
  constexpr uint64_t kTailStep = kTailRowBytes / 2 / 16;  // a dense wgmma has 16 columns
  constexpr int kTransposedRowBytes = kSm90BlockRows * kElementBytes;
  constexpr uint64_t kTransposedTailStep = 16 * kTransposedRowBytes / 16;  // or rows

  const uint32_t values_of_consumer = consumer * kBlocks * kSm90BlockRows * kValueRowBytes;
  const uint32_t buffers = shared + T::kOut + consumer * kOutBuffers * kOutBytes;
  Ring<T> ring{shared};
  float sums[kBlocks][T::kTokens / 2];
  Metadata<kBlocks> metadata[2] = {};  // by parity of the quad

  const auto values_block = [&](int i) {
    return ptx::matrix_descriptor<kValueRowBytes>(ring.values() + values_of_consumer +
                                                  i * kSm90BlockRows * kValueRowBytes);
  };
  constexpr int kNone = -1;
  const auto release = [&](int stage) {
    if constexpr (T::kCluster == 1) {
      if (thread == 0) {
        ptx::barrier_arrive(ring.empty(stage));
      }
    } else if (thread < T::kCluster) {
      ptx::barrier_arrive_at(ring.empty(stage), thread);
    }
  };

  const Stages<T::kSegments> stages(args);
  const int clusters = gridDim.x / T::kClusterBlocks;
  const int tiles = args.row_tiles * args.token_tiles;
  const auto row_block_of = [&](int tile) {
    return place_of<T>(args, tile).row / kSm90BlockRows + consumer * kBlocks;
  };
  const int first_quad = stages.first() / kQuad;
  int row_block = row_block_of(blockIdx.x / T::kClusterBlocks);
  if (first_quad < stages.quads()) {
    metadata[0].load(args, row_block, first_quad, thread);
  }
  for (int tile = blockIdx.x / T::kClusterBlocks; tile < tiles; tile += clusters) {
    int k_tile = stages.first();
    int previous = T::kSegments == 1 ? 0 : kNone;  // stage whose wgmma may be under way

    const auto release_previous = [&] {
      if (T::kSegments == 1 || previous != kNone) {
        release(previous);
      }
    };

    // Sparse part, by pairs of quads; false after the last stage
    const auto multiply = [&]<int kStage>(std::integral_constant<int, kStage>) {
      constexpr int kInQuad = kStage % kQuad;
      const Metadata<kBlocks>& words = metadata[kStage / kQuad];
      Metadata<kBlocks>& other = metadata[1 - kStage / kQuad];
      ptx::barrier_wait(ring.full(ring.stage), ring.round);
      const uint64_t x = ptx::matrix_descriptor<kXRowBytes>(ring.x());
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const uint64_t values = values_block(i);
        const uint32_t word = words.word[i][kInQuad];
        Wgmma::template sparse<0>(sums[i], values, x, word,
                                  T::kSegments > 1 || k_tile != stages.first());
        Wgmma::template sparse<1>(sums[i], values + kValueStep, x + kXStep, word, 1);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (k_tile != stages.first()) {
        release(previous);
      }
      // The next quad, in the end the next tile's first: a load that is under way when the sums are
      // written to shared memory would be waited for there. After the wait, so that no word changes
      // that a multiplication may yet take
      if constexpr (kInQuad == 0) {
        const int quad = k_tile / kQuad + 1;
        if (quad < stages.quads()) {
          other.load(args, row_block, quad, thread);
        } else if (T::kSegments == 1 && tile + clusters < tiles) {
          row_block = row_block_of(tile + clusters);
          other.load(args, row_block, first_quad, thread);
        }
      }
      previous = ring.stage;
      ring.advance();
      return ++k_tile < stages.end();
    };
    const auto multiply_pair = [&]<int... kStage>(std::integer_sequence<int, kStage...>) {
      return (... && multiply(std::integral_constant<int, kStage>{}));
    };
    if constexpr (T::kSegments > 1) {  // may have no stage
#pragma unroll
      for (float& sum : sums[0]) {
        sum = 0.0f;
      }
    }
    if (T::kSegments == 1 || stages.first() < stages.end()) {
      while (multiply_pair(std::make_integer_sequence<int, 2 * kQuad>{})) {
      }
    }

    // Tail
    const auto multiply_tail = [&]<int kTransposed>(std::integral_constant<int, kTransposed>) {
#pragma unroll 1
      for (int tail_tile = stages.tail_first(); tail_tile < stages.tail_end(); ++tail_tile) {
        constexpr int kRowBytes = kTransposed != 0 ? kTransposedRowBytes : kTailRowBytes;
        constexpr uint64_t kWeightStep = kTransposed != 0 ? kTransposedTailStep : kTailStep;
        ptx::barrier_wait(ring.full(ring.stage), ring.round);
        const uint64_t x = ptx::matrix_descriptor<kTailRowBytes>(ring.x());
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const uint64_t weight = ptx::matrix_descriptor<kRowBytes>(
              ring.values() + values_of_consumer + i * kSm90BlockRows * kTailRowBytes);
          Wgmma::template dense<kTransposed>(sums[i], weight, x);
          Wgmma::template dense<kTransposed>(sums[i], weight + kWeightStep, x + kTailStep);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        release_previous();
        previous = ring.stage;
        ring.advance();
      }
    };
    if (args.tail_is_transposed) {
      multiply_tail(std::integral_constant<int, 1>{});
    } else {
      multiply_tail(std::integral_constant<int, 0>{});
    }

    ptx::wgmma_wait<0>();
    release_previous();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      ptx::wgmma_keep_after(sums[i]);
    }
    // Output. The place is computed anew: the sums leave no registers to keep it in
    const TilePlace place = place_of<T>(args, tile);
    if constexpr (T::kSegments > 1) {
      add_segments<T>(sums[0], args.tokens - place.token, shared, consumer, thread);
    }
    const int row = place.row + consumer * kBlocks * kSm90BlockRows;
    store_sums<kKind, T, kActivation>(args, sums, {row, place.token}, buffers, consumer, thread);
    if (T::kSegments == 1 && (stages.quads() - first_quad) % 2 != 0) {
      metadata[0] = metadata[1];  // a tile starts with these
    }
  }
  if (thread == 0) {
    ptx::tma_store_wait<0>();
  }
}

// ---- kernel ------------------------------------------------------------------------------

template <FloatKind kKind, typename T, Activation kActivation>
__global__ void __launch_bounds__(kThreads, 1)
    spmm_sm90_kernel(const __grid_constant__ SpmmSm90Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t dynamic_shared[];
  const uint32_t aligned = (ptx::shared_address(dynamic_shared) + kSharedAlignment - 1) /
                           kSharedAlignment * kSharedAlignment;
  const uint32_t shared = __shfl_sync(~0u, aligned, 0);  // else it is computed anew at each use

  if (threadIdx.x == 0) {
    const Ring<T> ring{shared};
    for (int stage = 0; stage < T::kStages; ++stage) {
      ptx::barrier_init(ring.full(stage), 1);
      ptx::barrier_init(ring.empty(stage), kConsumers * T::kCluster);
    }
    ptx::fence_barrier_init();
    ptx::prefetch_map(&args.values[args.rows < T::kRows]);
    ptx::prefetch_map(&args.x[args.tokens <= T::kTokens - 8]);
    ptx::prefetch_map(&args.y);
  }
  if constexpr (T::kClusterBlocks == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  wait_for_previous_kernel();
  let_next_kernel_start();

  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == 0) {
    ptx::give_registers<kProducerRegisters<T::kSegments>>();
    if (threadIdx.x == 0) {
      produce<T>(args, shared);
    }
    if constexpr (T::kSegments > 1) {
      __syncwarp();
      ptx::cluster_sync();  // that of add_segments
    }
  } else {
    ptx::take_registers<kConsumerRegisters<T::kSegments>>();
    consume<kKind, T, kActivation>(args, shared, warpgroup - 1, threadIdx.x % kWarpgroup);
  }
  if constexpr (T::kClusterBlocks > 1) {
    __syncwarp();
    ptx::cluster_sync();  // no block leaves while another writes to it, or reads from it
  }
#else
  __trap();  // the launcher checks the device
#endif
}

// ---- launcher ----------------------------------------------------------------------------

template <int kRows, int kTokens, int kStages, int kCluster, int kSegments>
using TileOf = Tile<kRows / (kConsumers * kSm90BlockRows), kTokens, kStages, kCluster, kSegments>;

// Each activation is a kernel of its own: a branch would be taken for every pair of sums.
template <FloatKind kKind, typename T>
cudaError_t launch(const SpmmSm90Args& args, unsigned blocks, bool starts_early,
                   cudaStream_t stream) {
  const auto launch_as =
      [&]<Activation kActivation>(std::integral_constant<Activation, kActivation>) {
        return launch_kernel<&spmm_sm90_kernel<kKind, T, kActivation>, T::kSharedBytes>(
            {blocks, kThreads, starts_early, T::kClusterBlocks}, stream, args);
      };
  switch (args.activation) {
    case Activation::kNone:
      return launch_as(std::integral_constant<Activation, Activation::kNone>());
    case Activation::kRelu:
      return launch_as(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kSwiglu:
      return launch_as(std::integral_constant<Activation, Activation::kSwiglu>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace sm90

template <int kRows, int kTokens, int kStages, int kCluster, int kSegments>
cudaError_t SpmmSm90Tile<kRows, kTokens, kStages, kCluster, kSegments>::launch(
    const SpmmSm90Args& args, FloatKind kind, unsigned blocks, bool starts_early,
    cudaStream_t stream) {
  using T = sm90::TileOf<kRows, kTokens, kStages, kCluster, kSegments>;
  return kind == FloatKind::kHalf
             ? sm90::launch<FloatKind::kHalf, T>(args, blocks, starts_early, stream)
             : sm90::launch<FloatKind::kBFloat16, T>(args, blocks, starts_early, stream);
}

template <int kRows, int kTokens, int kStages, int kCluster, int kSegments>
int SpmmSm90Tile<kRows, kTokens, kStages, kCluster, kSegments>::clusters_at_once() {
  using T = sm90::TileOf<kRows, kTokens, kStages, kCluster, kSegments>;
  auto* const kernel = &sm90::spmm_sm90_kernel<FloatKind::kBFloat16, T, Activation::kNone>;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {T::kClusterBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = T::kClusterBlocks;
  config.blockDim = sm90::kThreads;
  config.dynamicSmemBytes = T::kSharedBytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  const bool known = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          T::kSharedBytes) == cudaSuccess &&
                     cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess;
  if (!known) {
    (void)cudaGetLastError();  // asking is no call that failed
  }
  return known ? clusters : -1;
}

}  // namespace slope
