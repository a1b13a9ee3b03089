// SPDX-License-Identifier: Apache-2.0
//
// Host side of spmm_sm90: which tile, tensor maps, launch. No torch header.
#include "ops/spmm_sm90.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <utility>

#include "common/hash.h"
#include "common/round_up.h"
#include "ops/spmm_sm90_args.h"

namespace slope {
namespace {

struct Tile {
  int rows, tokens, cluster, segments;
  double stage_us;  // of a stage, with all blocks at work
  double next_us;   // what a further tile of a block adds beside its stages, without segments
  double sum_us;    // to add up segments
  decltype(&SpmmSm90Tile<256, 192, 4, 2, 1>::launch) launch;
  decltype(&SpmmSm90Tile<256, 192, 4, 2, 1>::clusters_at_once) clusters_at_once;
};

template <int kRows, int kTokens, int kStages, int kCluster, int kSegments = 1>
constexpr Tile tile_of(double stage_us, double next_us, double sum_us = 0.0) {
  using Kernel = SpmmSm90Tile<kRows, kTokens, kStages, kCluster, kSegments>;
  return {kRows,     kTokens,         kCluster,
          kSegments, stage_us,        next_us,
          sum_us,    &Kernel::launch, &Kernel::clusters_at_once};
}

// Times by a fit to products of 16 shapes with 1 to 8192 tokens on an H200, in bursts and at the
// power limit (tiles of 64 tokens and three segments: 10 shapes with 8 to 256 tokens; tiles of
// 128 x 192: 10 with 128 to 2048; 128 x 256 in two segments: 8 products); what counts is which tile
// has the least.
constexpr std::array<Tile, 18> kTiles{{
    tile_of<256, 192, 4, 2>(0.661, 2.3),
    tile_of<256, 176, 4, 2>(0.619, 2.0),
    tile_of<256, 168, 4, 2>(0.583, 3.1),
    tile_of<256, 160, 4, 2>(0.555, 2.7),
    tile_of<256, 152, 4, 2>(0.542, 2.8),
    tile_of<256, 128, 5, 2>(0.464, 2.4),
    tile_of<128, 256, 4, 2>(0.435, 2.9),
    tile_of<128, 256, 4, 1, 2>(0.454, 0.0, 6.6),
    tile_of<128, 192, 5, 2>(0.338, 2.7),
    tile_of<128, 192, 5, 1, 2>(0.318, 0.0, 5.4),
    tile_of<128, 128, 6, 1>(0.264, 1.6),
    tile_of<128, 128, 6, 1, 2>(0.254, 0.0, 1.2),
    tile_of<128, 128, 6, 1, 3>(0.254, 0.0, 2.3),
    tile_of<128, 128, 6, 1, 4>(0.260, 0.0, 2.4),
    tile_of<128, 64, 10, 1>(0.222, 1.2),
    tile_of<128, 64, 10, 1, 2>(0.222, 0.0, 0.3),
    tile_of<128, 64, 10, 1, 3>(0.222, 0.0, 1.2),
    tile_of<128, 64, 10, 1, 4>(0.222, 0.0, 2.8),
}};
constexpr double kLateStartUs = 1.4;  // of a kernel that waits for the one before it to end
// Of a product in two kernels, by a fit to 119 in rows of launches and 6 in bursts
constexpr double kSplitUs = 4.0;      // for having two
constexpr double kSplitGain = 0.02;   // of one kernel's time, at least: the times err by as much
constexpr int kNarrowTokens = 128;    // of tiles whose stages take longer in the second kernel,
constexpr double kNarrowRest = 0.35;  // by this part for each further segment

constexpr int kElementBytes = 2;
constexpr int kDevices = 64;       // that are remembered
constexpr int kRemembered = 256;   // choices of a thread
constexpr int kRasterRows = 3072;  // of W that blocks work on at a time

// ---- tensor maps ---------------------------------------------------------------------------

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Looked up in the driver, so that nothing links to it.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                                12000, cudaEnableDefault, &result);
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(found)
               : nullptr;
  }();
  return function;
}

struct Matrix {
  const void* data;
  int64_t rows, columns;  // row-major
  int64_t stride;         // elements from row to row
};

Matrix contiguous(const void* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns};
}

struct Box {
  int rows, columns;  // the columns are one swizzle span wide
};

// Rows of the boxes of an operand: of tiles that lie within it, and of the one that its end cuts.
// 0: there is none.
struct BoxRows {
  int whole, cut;
};

// Maps of one product; remembers whether one was refused.
class MapMaker {
 public:
  explicit MapMaker(FloatKind kind)
      : type_(kind == FloatKind::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) {}

  CUtensorMap make(const Matrix& matrix, Box box) {
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.columns),
                                 static_cast<cuuint64_t>(matrix.rows)};
    const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(matrix.stride) * kElementBytes};
    const cuuint32_t box_sizes[2] = {static_cast<cuuint32_t>(box.columns),
                                     static_cast<cuuint32_t>(box.rows)};
    const cuuint32_t steps[2] = {1, 1};
    CUtensorMap map{};
    const CUresult result = encode_tiled()(
        &map, type_, 2, const_cast<void*>(matrix.data), sizes, row_bytes, box_sizes, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        box.columns * kElementBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    good_ = good_ && result == CUDA_SUCCESS;
    return map;
  }

  bool good() const { return good_; }

 private:
  CUtensorMapDataType type_;
  bool good_ = true;
};

// ---- device --------------------------------------------------------------------------------

// What `ask` says, kept once asked for each device that `known` has a place for, which holds one
// more than the answer.
template <typename Ask>
int remembered(std::array<std::atomic<int>, kDevices>& known, int device, Ask ask) {
  if (device >= kDevices) {
    return ask();
  }
  int found = known[device].load(std::memory_order_relaxed);
  if (found == 0) {
    found = ask() + 1;
    known[device].store(found, std::memory_order_relaxed);
  }
  return found - 1;
}

int ask_processors(int device) {
#ifdef SLOPE_SM90A
  int major = 0, minor = 0, processors = 0;
  for (const auto& [value, attribute] : {std::pair{&major, cudaDevAttrComputeCapabilityMajor},
                                         std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
                                         std::pair{&processors, cudaDevAttrMultiProcessorCount}}) {
    if (cudaDeviceGetAttribute(value, attribute, device) != cudaSuccess) {
      return 0;
    }
  }
  return major == 9 && minor == 0 && encode_tiled() != nullptr ? processors : 0;
#else
  (void)device;
  return 0;
#endif
}

// Multiprocessors of a device that runs the kernels, else 0.
int processors_of(int device) {
  static std::array<std::atomic<int>, kDevices> known{};
  return remembered(known, device, [=] { return ask_processors(device); });
}

// Clusters of a tile that run at the same time. Those of two are pairs of multiprocessors that any
// device has; how many larger ones there are depends on the chip.
int clusters_at_once(int index, int device, int processors) {
  const Tile& tile = kTiles[index];
  const int most = processors / (tile.cluster * tile.segments);
  if (tile.segments == 1) {
    return most;
  }
  static std::array<std::array<std::atomic<int>, kDevices>, kTiles.size()> known{};
  return remembered(known[index], device, [&] {
    const int asked = tile.clusters_at_once();
    return asked > 0 ? std::min(asked, most) : most * 15 / 16;
  });
}

// ---- choice of the tile ------------------------------------------------------------------

// How the product of some rows of W is cut into tiles, and the microseconds that it takes.
struct Cut {
  int tile;
  int64_t row_tiles, token_tiles;  // those of a cluster are one
  int64_t clusters;                // 0: the device cannot run them
  bool starts_early;               // LaunchShape
  double time;                     // infinite: not to be chosen
};

// Blocks that start early come first to multiprocessors that the kernel before leaves idle: of two
// kernels with few blocks all, of two with many almost none. In between, from half to three
// quarters of the multiprocessors, some do, and then the blocks crowd in one part of the GPU and
// share the way to L2: up to 35 % longer, measured in rows of one product.
bool may_start_early(int64_t blocks, int processors) {
  return 2 * blocks <= processors || 4 * blocks >= 3 * int64_t{processors};
}

Cut cut_of(int index, const SpmmSm90Params& params, int64_t rows, int processors,
           bool is_rest = false) {
  const Tile& tile = kTiles[index];
  const int64_t row_tiles = ceil_div(rows, int64_t{tile.rows} * tile.cluster);
  const int64_t token_tiles = ceil_div(params.tokens, tile.tokens);
  const int64_t tiles = row_tiles * token_tiles;
  const int64_t at_once = clusters_at_once(index, params.device, processors);
  Cut cut{index, row_tiles, token_tiles, 0, false, std::numeric_limits<double>::infinity()};
  if (at_once == 0) {
    return cut;
  }
  // Every cluster takes as many tiles, one after the other, as the busiest has to. Those with
  // segments take one, and where they come in several rounds, each starts anew: 5120 x 20480 with
  // 256 tokens took 94 us in three of four segments, 73 us in one round without
  const bool in_segments = tile.segments > 1;
  const auto rounds = static_cast<double>(ceil_div(tiles, at_once));
  cut.clusters = in_segments ? tiles : std::min(tiles, at_once);
  cut.starts_early = may_start_early(cut.clusters * tile.cluster * tile.segments, processors);
  if (in_segments && rounds > 1.0) {
    return cut;
  }

  const int64_t k_tiles = ceil_div(params.columns, kSm90TileColumns);
  const int64_t quads = ceil_div(params.columns, kSm90QuadColumns);
  const int64_t segment = ceil_div(quads, tile.segments) * (kSm90QuadColumns / kSm90TileColumns);
  const auto stages = static_cast<double>((in_segments ? std::min(k_tiles, segment) : k_tiles) +
                                          ceil_div(params.rank, kSm90TailTileColumns));
  const double stage_us =
      tile.stage_us *
      (is_rest && tile.tokens <= kNarrowTokens ? 1.0 + kNarrowRest * (tile.segments - 1) : 1.0);
  cut.time = rounds * stages * stage_us + (rounds - 1) * tile.next_us + tile.sum_us +
             (cut.starts_early ? 0.0 : kLateStartUs);
  return cut;
}

Cut fastest_cut(const SpmmSm90Params& params, int64_t rows, int processors, bool is_rest = false) {
  Cut best = cut_of(0, params, rows, processors, is_rest);
  for (int index = 1; index < spmm_sm90_tile_count(); ++index) {
    const Cut other = cut_of(index, params, rows, processors, is_rest);
    best = other.time < best.time ? other : best;
  }
  return best;
}

// W's rows by one kernel, or the first by one and the rest by another.
struct Split {
  int64_t first_rows;
  Cut first, rest;  // rest counts if there are more rows than the first
};

// One kernel, unless two do it sooner: one whose tiles fill every round, and one for what would be
// a last round that leaves much of the GPU idle, with smaller tiles or in segments:
//
//   36864 x 9216, 256 tokens    144 clusters of two tiles, 66 at once: three rounds
//   rows     0 .. 33791         132 of them: two rounds
//   rows 33792 .. 36863         48 tiles of 128 x 128, in two segments: a third of a round
Split fastest_split(const SpmmSm90Params& params, int processors) {
  Split best{params.rows, fastest_cut(params, params.rows, processors), {}};
  double time = best.first.time * (1.0 - kSplitGain);
  for (int index = 0; index < spmm_sm90_tile_count(); ++index) {
    const Tile& tile = kTiles[index];
    if (tile.segments > 1) {
      continue;
    }
    const Cut whole = cut_of(index, params, params.rows, processors);
    if (whole.clusters == 0) {
      continue;
    }
    const int64_t full_rounds = whole.row_tiles * whole.token_tiles / whole.clusters;
    const int64_t row_tiles = full_rounds * whole.clusters / whole.token_tiles;
    const int64_t first_rows = row_tiles * tile.rows * tile.cluster;
    if (first_rows == 0 || first_rows >= params.rows) {
      continue;
    }
    const Cut first = cut_of(index, params, first_rows, processors);
    if (first.time + kSplitUs >= time) {
      continue;
    }
    const Cut rest = fastest_cut(params, params.rows - first_rows, processors, true);
    if (const double both = first.time + kSplitUs + rest.time; both < time) {
      best = {first_rows, first, rest};
      time = both;
    }
  }
  return best;
}

// What fastest_split() depends on, for a device.
struct Sizes {
  int device = -1;
  int64_t rows = 0, columns = 0, tokens = 0, rank = 0;

  bool operator==(const Sizes&) const = default;
};

// The split that was asked for, else the fastest, which a thread remembers.
Split choose_split(const SpmmSm90Params& params, int processors) {
  if (params.tile >= 0) {
    const int64_t first_rows = params.first_rows > 0 ? params.first_rows : params.rows;
    return {first_rows, cut_of(params.tile, params, first_rows, processors),
            cut_of(params.rest_tile, params, params.rows - first_rows, processors)};
  }
  struct Known {
    Sizes sizes;
    Split split;
  };
  static thread_local std::array<Known, kRemembered> known{};

  const Sizes sizes{params.device, params.rows, params.columns, params.tokens, params.rank};
  const uint64_t hash =
      hash_of({sizes.device, sizes.rows, sizes.columns, sizes.tokens, sizes.rank});
  Known& place = known[hash % kRemembered];
  if (place.sizes != sizes) {
    place = {sizes, fastest_split(params, processors)};
  }
  return place.split;
}

// ---- checks ----------------------------------------------------------------------------------

bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

bool has_valid_sizes(const SpmmSm90Params& params) {
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max() - 256;  // and a tile more
  const bool sizes = params.tokens >= 0 && params.tokens <= kMaxSize && params.rows >= 0 &&
                     params.rows <= kMaxSize && params.rows % 8 == 0 && params.columns >= 0 &&
                     params.columns <= kMaxSize && params.columns % kSm90AtomColumns == 0 &&
                     params.rank >= 0 && params.rank <= kMaxSize && params.rank % 8 == 0;
  const bool tile = params.tile >= -1 && params.tile < spmm_sm90_tile_count() &&
                    params.rest_tile >= 0 && params.rest_tile < spmm_sm90_tile_count();
  const bool split = params.first_rows >= 0 && params.first_rows <= params.rows &&
                     params.first_rows % kSm90BlockRows == 0;
  return sizes && tile && split;
}

bool is_valid(const SpmmSm90Params& params) {
  const bool pointers = is_aligned(params.x, 16) && is_aligned(params.values, 16) &&
                        is_aligned(params.metadata, 16) && is_aligned(params.tail_x, 16) &&
                        is_aligned(params.tail_weight, 16) && is_aligned(params.bias, 2) &&
                        is_aligned(params.y, 16);
  const bool tail = params.rank == 0 || (params.tail_x != nullptr && params.tail_weight != nullptr);
  const bool kind = params.kind == FloatKind::kHalf || params.kind == FloatKind::kBFloat16;
  const bool gated = params.activation == Activation::kSwiglu;
  const bool activation = params.activation == Activation::kNone ||
                          params.activation == Activation::kRelu ||
                          (gated && params.rows % (2 * kGateRows) == 0);
  return has_valid_sizes(params) && pointers && tail && kind && activation;
}

// ---- one kernel ------------------------------------------------------------------------------

// The product of `count` rows of W from `first` on, a multiple of 64.
SpmmSm90Params part_of(const SpmmSm90Params& params, int64_t first, int64_t count) {
  const auto moved = [](const void* pointer, int64_t bytes) -> const void* {
    return pointer == nullptr ? nullptr : static_cast<const uint8_t*>(pointer) + bytes;
  };
  const int64_t quads = ceil_div(params.columns, kSm90QuadColumns);
  SpmmSm90Params part = params;
  part.values = moved(params.values, first * (params.columns / 2) * kElementBytes);
  part.metadata = moved(params.metadata, first / kSm90BlockRows * quads * kSm90QuadBytes);
  part.tail_weight = moved(params.tail_weight, first * params.rank * kElementBytes);
  part.bias = moved(params.bias, first * kElementBytes);
  part.y = static_cast<uint8_t*>(params.y) + features_of(first, params.activation) * kElementBytes;
  part.rows = count;
  return part;
}

// Launches the kernel for the rows of W in `params`; rows of Y are `features` apart, not
// contiguous.
cudaError_t launch_cut(const SpmmSm90Params& params, const Cut& cut, int64_t features,
                       cudaStream_t stream) {
  const Tile& tile = kTiles[cut.tile];
  const int64_t tiles = cut.row_tiles * cut.token_tiles;
  if ((tiles + cut.clusters) * tile.segments > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }

  // Maps. Those that no tile uses, and those of an absent tail, stay empty
  MapMaker maps(params.kind);
  SpmmSm90Args args{};
  const auto map_pair = [&](CUtensorMap(&pair)[2], const Matrix& matrix, BoxRows rows,
                            int columns) {
    pair[0] = rows.whole > 0 ? maps.make(matrix, {rows.whole, columns}) : CUtensorMap{};
    pair[1] = rows.cut > 0 ? maps.make(matrix, {rows.cut, columns}) : CUtensorMap{};
  };
  const BoxRows w_rows{params.rows >= tile.rows ? tile.rows : 0,
                       static_cast<int>(params.rows % tile.rows)};
  const int64_t tokens = round_up(params.tokens, 8);
  const BoxRows x_rows{tokens >= tile.tokens ? sm90_x_part(tile.tokens, tile.cluster) : 0,
                       sm90_x_part(static_cast<int>(tokens % tile.tokens), tile.cluster)};
  map_pair(args.values, contiguous(params.values, params.rows, params.columns / 2), w_rows,
           kSm90TileColumns / 2);
  map_pair(args.x, contiguous(params.x, params.tokens, params.columns), x_rows, kSm90TileColumns);
  if (params.rank > 0) {
    map_pair(args.tail_weight, contiguous(params.tail_weight, params.rows, params.rank), w_rows,
             kSm90TailTileColumns);
    map_pair(args.tail_x, contiguous(params.tail_x, params.tokens, params.rank), x_rows,
             kSm90TailTileColumns);
  }
  const Matrix y{params.y, params.tokens, features_of(params.rows, params.activation), features};
  const auto out_box = static_cast<int>(features_of(kSm90OutBox, params.activation));
  const int rest = tile.tokens % kSm90OutBox;
  args.y = maps.make(y, {kSm90OutBox, out_box});
  args.y_rest = rest == 0 ? args.y : maps.make(y, {rest, out_box});
  if (!maps.good()) {
    return cudaErrorInvalidValue;
  }

  args.metadata = static_cast<const uint4*>(params.metadata);
  args.bias = params.bias;
  args.activation = params.activation;
  args.rows = static_cast<int>(params.rows);
  args.tokens = static_cast<int>(params.tokens);
  args.quads = static_cast<int>(ceil_div(params.columns, kSm90QuadColumns));
  args.row_blocks = static_cast<int>(ceil_div(params.rows, kSm90BlockRows));
  args.k_tiles = static_cast<int>(ceil_div(params.columns, kSm90TileColumns));
  args.tail_tiles = static_cast<int>(ceil_div(params.rank, kSm90TailTileColumns));
  args.row_tiles = static_cast<int>(cut.row_tiles);
  args.token_tiles = static_cast<int>(cut.token_tiles);
  // Groups of equal height, but for what is left over
  const int64_t most = kRasterRows / (tile.rows * tile.cluster);
  const int64_t height = ceil_div(cut.row_tiles, ceil_div(cut.row_tiles, most));
  const int64_t last = cut.row_tiles - (ceil_div(cut.row_tiles, height) - 1) * height;
  args.group_tiles = make_divisor(static_cast<uint32_t>(height * cut.token_tiles));
  args.group_height = make_divisor(static_cast<uint32_t>(height));
  args.last_height = make_divisor(static_cast<uint32_t>(last));

  const auto blocks = static_cast<unsigned>(cut.clusters * tile.cluster * tile.segments);
  return tile.launch(args, params.kind, blocks, cut.starts_early, stream);
}

}  // namespace

// ---- launcher --------------------------------------------------------------------------------

bool spmm_sm90_runs(int device) { return processors_of(device) > 0; }

int spmm_sm90_tile_count() { return static_cast<int>(kTiles.size()); }

cudaError_t choose_spmm_sm90(SpmmSm90Params& params) {
  const int processors = processors_of(params.device);
  if (!has_valid_sizes(params) || params.tokens == 0 || params.rows == 0) {
    return cudaErrorInvalidValue;
  }
  if (processors == 0) {
    return cudaErrorNotSupported;
  }
  const Split split = choose_split(params, processors);
  params.first_rows = split.first_rows < params.rows ? split.first_rows : 0;
  params.tile = split.first.tile;
  params.rest_tile = split.rest.tile;
  return cudaSuccess;
}

cudaError_t launch_spmm_sm90(const SpmmSm90Params& params, cudaStream_t stream) {
  if (!is_valid(params)) {
    return cudaErrorInvalidValue;
  }
  if (params.tokens == 0 || params.rows == 0) {
    return cudaSuccess;
  }
  if (params.columns == 0) {
    return cudaErrorInvalidValue;
  }

  const int processors = processors_of(params.device);
  if (processors == 0) {
    return cudaErrorNotSupported;
  }
  const Split split = choose_split(params, processors);
  const int64_t features = features_of(params.rows, params.activation);
  const int64_t rest_rows = params.rows - split.first_rows;
  if (split.first.clusters == 0 || (rest_rows > 0 && split.rest.clusters == 0)) {
    return cudaErrorInvalidValue;
  }
  const cudaError_t status =
      launch_cut(part_of(params, 0, split.first_rows), split.first, features, stream);
  if (status != cudaSuccess || rest_rows == 0) {
    return status;
  }
  return launch_cut(part_of(params, split.first_rows, rest_rows), split.rest, features, stream);
}

}  // namespace slope

int slope_spmm_sm90(const void* params, void* stream) {
  return slope::launch_spmm_sm90(*static_cast<const slope::SpmmSm90Params*>(params),
                                 static_cast<cudaStream_t>(stream));
}

int slope_spmm_sm90_choose(void* params) {
  return slope::choose_spmm_sm90(*static_cast<slope::SpmmSm90Params*>(params));
}
