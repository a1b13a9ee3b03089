// SPDX-License-Identifier: Apache-2.0
#include "ops/spmm_sm90_choice.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "common/round_up.h"

namespace slope {
namespace {

constexpr int kTiles = static_cast<int>(kSm90Tiles.size());
constexpr double kLateStartUs = 1.4;   // of a kernel of few blocks that waits for the one before
constexpr double kScatteredUs = 50.0;  // from this on a late start costs nothing that measures
// Of a product in two kernels, by a fit to 119 in rows of launches and 21 in bursts too
constexpr double kSplitUs = 4.0;      // for having two
constexpr double kSplitGain = 0.04;   // of one kernel's time, at least: the times err by as much
constexpr int kNarrowTokens = 128;    // of tiles whose stages take longer in the second kernel,
constexpr double kNarrowRest = 0.35;  // by this part for each further segment

// Blocks that start early come to multiprocessors as the kernel before leaves them. Where that does
// harm:
//
// They crowd. First come those that are idle: of two kernels with few blocks all, of two with many
// almost none. In between, from half to three quarters of the multiprocessors, some are, and then
// the blocks crowd in one part of the GPU and share the way to L2: up to 35 % longer, measured in
// rows of one product.
bool would_crowd(int64_t blocks, int processors) {
  return 2 * blocks > processors && 4 * blocks < 3 * int64_t{processors};
}

// They scatter. A kernel of many small blocks, as that which refreshes the backward copy, leaves
// multiprocessors one by one, in any order. Neighbouring blocks, which read the same rows of X,
// then lie far apart; blocks of a cluster do not. Started late, the first is beside the second:
//
//   multiprocessors of blocks 0, 1, 2, ...    late     124 125 126 127 ... 131   6   7  22  23
//                                             early     78  83  77  69   5  33 129  97  63  41
//
// After that kernel, 14336 x 4096 by 128 x 256 without clusters took 237 us instead of 208 with
// 2048 tokens, 962 instead of 828 with 8192. A short product ends before it matters, and blocks of
// one tile of tokens all read the same X, wherever they lie.
bool would_scatter(const Sm90Tile& tile, const Sm90Cut& cut) {
  return tile.cluster == 1 && tile.segments == 1 && cut.token_tiles > 1 && cut.time > kScatteredUs;
}

// Whether whole rounds of these tiles may be the first of two kernels. 128 x 128 takes longer in
// all multiprocessors than its time says: 9216 x 36864 with 384 tokens took 301 us with such tiles
// first, in one kernel of 256 x 128 it takes 263.
bool may_come_first(const Sm90Tile& tile) {
  return tile.segments == 1 && !(tile.rows == 128 && tile.tokens == 128);
}

Sm90Cut fastest_cut(const Sm90Product& product, const Sm90Room& room, bool is_rest = false) {
  Sm90Cut best = sm90_cut(0, product, room, is_rest);
  for (int tile = 1; tile < kTiles; ++tile) {
    const Sm90Cut other = sm90_cut(tile, product, room, is_rest);
    best = other.time < best.time ? other : best;
  }
  return best;
}

struct TimedSplit {
  Sm90Split split;
  double time;
};

// Two kernels: one whose tiles fill every round, and one for what would be a last round that leaves
// much of the GPU idle, with smaller tiles or in segments:
//
//   36864 x 9216, 256 tokens    144 clusters of two tiles, 66 at once: three rounds
//   rows     0 .. 33791         132 of them: two rounds
//   rows 33792 .. 36863         48 tiles of 128 x 128, in two segments: a third of a round
//
// Nothing where that is not possible, or takes `limit` or longer.
std::optional<TimedSplit> in_two(int index, const Sm90Product& product, const Sm90Room& room,
                                 double limit) {
  const Sm90Tile& tile = kSm90Tiles[index];
  const Sm90Cut whole = sm90_cut(index, product, room);
  if (!may_come_first(tile) || whole.clusters == 0) {
    return std::nullopt;
  }
  const int64_t full_rounds = whole.row_tiles * whole.token_tiles / whole.clusters;
  const int64_t row_tiles = full_rounds * whole.clusters / whole.token_tiles;
  const int64_t first_rows = row_tiles * tile.rows * tile.cluster;
  if (first_rows == 0 || first_rows >= product.rows) {
    return std::nullopt;
  }
  const Sm90Cut first = sm90_cut(index, product.with_rows(first_rows), room);
  if (first.time + kSplitUs >= limit) {
    return std::nullopt;
  }
  const Sm90Cut rest = fastest_cut(product.with_rows(product.rows - first_rows), room, true);
  const double time = first.time + kSplitUs + rest.time;
  return time < limit ? std::optional(TimedSplit{{first_rows, first, rest}, time}) : std::nullopt;
}

}  // namespace

Sm90Cut sm90_cut(int index, const Sm90Product& product, const Sm90Room& room, bool is_rest) {
  const Sm90Tile& tile = kSm90Tiles[index];
  const int64_t row_tiles = ceil_div(product.rows, int64_t{tile.rows} * tile.cluster);
  const int64_t token_tiles = ceil_div(product.tokens, int64_t{tile.tokens});
  const int64_t tiles = row_tiles * token_tiles;
  const int64_t at_once = room.clusters[index];
  Sm90Cut cut{index, row_tiles, token_tiles, 0, false, std::numeric_limits<double>::infinity()};
  if (at_once == 0) {
    return cut;
  }
  // Every cluster takes as many tiles, one after the other, as the busiest has to. Those with
  // segments take one, and where they come in several rounds, each starts anew: 5120 x 20480 with
  // 256 tokens took 94 us in three of four segments, 73 us in one round without
  const bool in_segments = tile.segments > 1;
  const auto rounds = static_cast<double>(ceil_div(tiles, at_once));
  cut.clusters = in_segments ? tiles : std::min(tiles, at_once);
  cut.starts_early = !would_crowd(cut.clusters * tile.cluster * tile.segments, room.processors);
  if (in_segments && rounds > 1.0) {
    return cut;
  }

  const int64_t k_tiles = ceil_div(product.columns, kSm90TileColumns);
  const int64_t quads = ceil_div(product.columns, kSm90QuadColumns);
  const int64_t segment = ceil_div(quads, tile.segments) * (kSm90QuadColumns / kSm90TileColumns);
  const auto stages = static_cast<double>(in_segments ? std::min(k_tiles, segment) : k_tiles);
  const bool is_narrow_rest = is_rest && tile.tokens <= kNarrowTokens;
  const double stage_us =
      tile.stage_us * (is_narrow_rest ? 1.0 + kNarrowRest * (tile.segments - 1) : 1.0);
  cut.time = rounds * stages * stage_us + (rounds - 1) * tile.next_us + tile.sum_us +
             (cut.starts_early ? 0.0 : kLateStartUs);
  cut.starts_early = cut.starts_early && !would_scatter(tile, cut);
  return cut;
}

Sm90Split sm90_split(const Sm90Product& product, const Sm90Room& room) {
  Sm90Split best{product.rows, fastest_cut(product, room), {}};
  double time = best.first.time * (1.0 - kSplitGain);
  for (int index = 0; index < kTiles; ++index) {
    if (const auto both = in_two(index, product, room, time)) {
      best = both->split;
      time = both->time;
    }
  }
  return best;
}

std::vector<Sm90Split> sm90_candidates(const Sm90Product& product, const Sm90Room& room,
                                       double factor) {
  const Sm90Split usual = sm90_split(product, room);
  const double usual_time =
      usual.first.time + (usual.first_rows < product.rows ? kSplitUs + usual.rest.time : 0.0);
  const double limit = factor * usual_time;
  std::vector<TimedSplit> others;
  for (int index = 0; index < kTiles; ++index) {
    const Sm90Cut whole = sm90_cut(index, product, room);
    const bool is_usual = usual.first_rows == product.rows && usual.first.tile == index;
    if (whole.time < limit && !is_usual) {
      others.push_back({{product.rows, whole, {}}, whole.time});
    }
    const auto both = in_two(index, product, room, limit);
    if (both && (usual.first_rows == product.rows || usual.first.tile != index)) {
      others.push_back(*both);
    }
  }
  std::stable_sort(others.begin(), others.end(),
                   [](const TimedSplit& a, const TimedSplit& b) { return a.time < b.time; });
  std::vector<Sm90Split> found{usual};
  for (const TimedSplit& other : others) {
    found.push_back(other.split);
  }
  return found;
}

}  // namespace slope
