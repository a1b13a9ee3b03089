// SPDX-License-Identifier: Apache-2.0
//
// Host side of spmm_sm90: what a device has room for, tensor maps, launch. No torch header.
#include "ops/spmm_sm90.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <mutex>
#include <new>
#include <optional>
#include <utility>

#include "common/round_up.h"
#include "ops/spmm_sm90_args.h"
#include "ops/spmm_sm90_choice.h"
#include "ops/spmm_sm90_tuned.h"

namespace slope {
namespace {

struct Kernel {
  decltype(&SpmmSm90Tile<256, 192, 4, 2, 1>::launch) launch;
  decltype(&SpmmSm90Tile<256, 192, 4, 2, 1>::clusters_at_once) clusters_at_once;
};

template <size_t kIndex>
constexpr Kernel kernel_of() {
  constexpr Sm90Tile kTile = kSm90Tiles[kIndex];
  using Of = SpmmSm90Tile<kTile.rows, kTile.tokens, kTile.stages, kTile.cluster, kTile.segments>;
  return {&Of::launch, &Of::clusters_at_once};
}

template <size_t... kIndices>
constexpr std::array<Kernel, sizeof...(kIndices)> kernels_of(std::index_sequence<kIndices...>) {
  return {kernel_of<kIndices>()...};
}

constexpr auto kKernels = kernels_of(std::make_index_sequence<kSm90Tiles.size()>());

constexpr int kElementBytes = 2;
constexpr int kRemembered = 256;        // choices of a thread
constexpr int kRasterRows = 3072;       // of W that clusters work on at a time,
constexpr int kRasterRowsAlone = 2560;  // or blocks that share no X

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

// What a device says, asked once.
template <typename Answer>
class OfDevices {
 public:
  template <typename Ask>
  Answer get(int device, Ask ask) {
    if (device >= kKnownDevices) {
      return ask();
    }
    std::call_once(asked_[device], [&] { answers_[device] = ask(); });
    return answers_[device];
  }

 private:
  std::array<std::once_flag, kKnownDevices> asked_;
  std::array<Answer, kKnownDevices> answers_{};
};

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
  static OfDevices<int> known;
  return known.get(device, [=] { return ask_processors(device); });
}

// Clusters of a tile that run at the same time on the current device. Those of two are pairs of
// multiprocessors that any has; how many larger ones there are depends on the chip.
int clusters_at_once(size_t index, int processors) {
  const Sm90Tile& tile = kSm90Tiles[index];
  const int most = processors / (tile.cluster * tile.segments);
  if (tile.cluster * tile.segments <= 2) {
    return most;
  }
  const int asked = kKernels[index].clusters_at_once();
  return asked >= 0 ? std::min(asked, most) : most * 15 / 16;
}

Sm90Room ask_room(int processors) {
  Sm90Room room{processors, {}};
  for (size_t index = 0; index < kSm90Tiles.size(); ++index) {
    room.clusters[index] = clusters_at_once(index, processors);
  }
  return room;
}

// Of the current device, which has so many multiprocessors.
Sm90Room room_of(int device, int processors) {
  static OfDevices<Sm90Room> known;
  return known.get(device, [=] { return ask_room(processors); });
}

// ---- choice --------------------------------------------------------------------------------

// Every tile's tokens are a multiple of 8, so what is cut up to that is cut alike.
Sm90Sizes sizes_of(int device, bool bfloat16, const Sm90Product& product) {
  return {device, bfloat16, product.rows, product.columns, round_up(product.tokens, 8)};
}

// One kernel or two of these tiles; first_rows 0: one.
Sm90Split split_of(const Sm90Product& product, const Sm90Room& room, int tile, int64_t first_rows,
                   int rest_tile) {
  const int64_t first = first_rows > 0 ? first_rows : product.rows;
  return {first, sm90_cut(tile, product.with_rows(first), room),
          sm90_cut(rest_tile, product.with_rows(product.rows - first), room)};
}

// The split that a tuner names, if there are such tiles, and room for them: all clusters of a tile
// in segments at once.
std::optional<Sm90Split> tuned_split(const SpmmSm90Tuned& tuned, const Sm90Product& product,
                                     const Sm90Room& room) {
  const auto is_tile = [](int tile) { return tile >= 0 && tile < spmm_sm90_tile_count(); };
  if (!is_tile(tuned.tile) || !is_tile(tuned.rest_tile)) {
    return std::nullopt;
  }
  const Sm90Tile& tile = kSm90Tiles[tuned.tile];
  const bool whole_tiles = tuned.first_rows % (tile.rows * tile.cluster) == 0;
  if (!whole_tiles || tuned.first_rows < 0 || tuned.first_rows >= product.rows) {
    return std::nullopt;
  }
  const Sm90Split split = split_of(product, room, tuned.tile, tuned.first_rows, tuned.rest_tile);
  const bool fits = std::isfinite(split.first.time) &&
                    (split.first_rows == product.rows || std::isfinite(split.rest.time));
  return fits ? std::optional(split) : std::nullopt;
}

// The split that was asked for, else the tuned one, else the fastest by the model of times; a
// thread remembers it.
Sm90Split choose_split(const SpmmSm90Params& params, int processors) {
  const Sm90Product product{params.rows, params.columns, params.tokens};
  if (params.tile >= 0) {
    return split_of(product, room_of(params.device, processors), params.tile, params.first_rows,
                    params.rest_tile);
  }
  struct Known {
    Sm90Sizes sizes;
    int64_t changes;  // of sm90_tuned_splits(), when it was looked up
    Sm90Split split;
  };
  static thread_local std::array<Known, kRemembered> known{};

  const Sm90Sizes sizes = sizes_of(params.device, params.kind == FloatKind::kBFloat16, product);
  // Read first: whatever changes from here on is noticed next time
  const int64_t changes = sm90_tuned_splits().changes();
  Known& place = known[HashSm90Sizes{}(sizes) % kRemembered];
  if (place.sizes != sizes || place.changes != changes) {
    sm90_tuned_splits().load(params.device);
    const auto tuned = sm90_tuned_splits().find(sizes);
    place = {sizes, changes,
             tuned ? *tuned : sm90_split(product, room_of(params.device, processors))};
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
  return sizes && tile && split && params.device >= 0;
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
  part.tail_weight =
      moved(params.tail_weight,
            first * (params.tail_is_transposed != 0 ? 1 : params.rank) * kElementBytes);
  part.bias = moved(params.bias, first * kElementBytes);
  part.y = static_cast<uint8_t*>(params.y) + features_of(first, params.activation) * kElementBytes;
  part.rows = count;
  return part;
}

// Launches the kernel for the rows of W in `params`, a part of `whole_rows`: so far apart are rows
// of a transposed tail factor, and by as many features rows of Y.
cudaError_t launch_cut(const SpmmSm90Params& params, const Sm90Cut& cut, int64_t whole_rows,
                       cudaStream_t stream) {
  const Sm90Tile& tile = kSm90Tiles[cut.tile];
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
    if (params.tail_is_transposed != 0) {
      args.tail_weight[0] = maps.make({params.tail_weight, params.rank, params.rows, whole_rows},
                                      {kSm90TailTileColumns, kSm90BlockRows});
    } else {
      map_pair(args.tail_weight, contiguous(params.tail_weight, params.rows, params.rank), w_rows,
               kSm90TailTileColumns);
    }
    map_pair(args.tail_x, contiguous(params.tail_x, params.tokens, params.rank), x_rows,
             kSm90TailTileColumns);
  }
  const Matrix y{params.y, params.tokens, features_of(params.rows, params.activation),
                 features_of(whole_rows, params.activation)};
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
  args.tail_is_transposed = params.tail_is_transposed != 0;
  args.rows = static_cast<int>(params.rows);
  args.tokens = static_cast<int>(params.tokens);
  args.quads = static_cast<int>(ceil_div(params.columns, kSm90QuadColumns));
  args.row_blocks = static_cast<int>(ceil_div(params.rows, kSm90BlockRows));
  args.k_tiles = static_cast<int>(ceil_div(params.columns, kSm90TileColumns));
  args.tail_tiles = static_cast<int>(ceil_div(params.rank, kSm90TailTileColumns));
  args.row_tiles = static_cast<int>(cut.row_tiles);
  args.token_tiles = static_cast<int>(cut.token_tiles);
  // Groups of equal height, but for what is left over
  const int64_t most =
      (tile.cluster > 1 ? kRasterRows : kRasterRowsAlone) / (tile.rows * tile.cluster);
  const int64_t height = ceil_div(cut.row_tiles, ceil_div(cut.row_tiles, most));
  const int64_t last = cut.row_tiles - (ceil_div(cut.row_tiles, height) - 1) * height;
  args.group_tiles = make_divisor(static_cast<uint32_t>(height * cut.token_tiles));
  args.group_height = make_divisor(static_cast<uint32_t>(height));
  args.last_height = make_divisor(static_cast<uint32_t>(last));

  const auto blocks = static_cast<unsigned>(cut.clusters * tile.cluster * tile.segments);
  return kKernels[cut.tile].launch(args, params.kind, blocks, cut.starts_early, stream);
}

}  // namespace

// ---- launcher --------------------------------------------------------------------------------

bool spmm_sm90_runs(int device) { return device >= 0 && processors_of(device) > 0; }

int spmm_sm90_tile_count() { return static_cast<int>(kSm90Tiles.size()); }

cudaError_t choose_spmm_sm90(SpmmSm90Params& params) {
  if (!has_valid_sizes(params) || params.tokens == 0 || params.rows == 0) {
    return cudaErrorInvalidValue;
  }
  const int processors = processors_of(params.device);
  if (processors == 0) {
    return cudaErrorNotSupported;
  }
  const Sm90Split split = choose_split(params, processors);
  params.first_rows = split.first_rows < params.rows ? split.first_rows : 0;
  params.tile = split.first.tile;
  params.rest_tile = split.rest.tile;
  return cudaSuccess;
}

bool tune_spmm_sm90(const SpmmSm90Tuned& tuned) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device != tuned.device) {
    return false;
  }
  const int processors = processors_of(device);
  if (processors == 0 || tuned.rows <= 0 || tuned.columns <= 0 || tuned.tokens <= 0) {
    return false;
  }
  const Sm90Product product{tuned.rows, tuned.columns, tuned.tokens};
  std::optional<Sm90Split> split;
  if (tuned.tile != -1) {
    split = tuned_split(tuned, product, room_of(tuned.device, processors));
    if (!split) {
      return false;
    }
  }
  try {
    sm90_tuned_splits().set(sizes_of(tuned.device, tuned.bfloat16, product), split);
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

void forget_tuned_spmm_sm90() { sm90_tuned_splits().clear(); }

void set_spmm_sm90_loader(SpmmSm90Loader loader) { sm90_tuned_splits().set_loader(loader); }

cudaError_t ask_spmm_sm90_room(Sm90Room& room) {
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) {
    return status;
  }
  const int processors = processors_of(device);
  if (processors == 0) {
    return cudaErrorNotSupported;
  }
  room = room_of(device, processors);
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
  const Sm90Split split = choose_split(params, processors);
  const int64_t rest_rows = params.rows - split.first_rows;
  if (split.first.clusters == 0 || (rest_rows > 0 && split.rest.clusters == 0)) {
    return cudaErrorInvalidValue;
  }
  const cudaError_t status =
      launch_cut(part_of(params, 0, split.first_rows), split.first, params.rows, stream);
  if (status != cudaSuccess || rest_rows == 0) {
    return status;
  }
  return launch_cut(part_of(params, split.first_rows, rest_rows), split.rest, params.rows, stream);
}

}  // namespace slope

int slope_spmm_sm90(const void* params, void* stream) {
  return slope::launch_spmm_sm90(*static_cast<const slope::SpmmSm90Params*>(params),
                                 static_cast<cudaStream_t>(stream));
}

int slope_spmm_sm90_choose(void* params) {
  return slope::choose_spmm_sm90(*static_cast<slope::SpmmSm90Params*>(params));
}

int slope_spmm_sm90_room(void* room) {
  return slope::ask_spmm_sm90_room(*static_cast<slope::Sm90Room*>(room));
}
