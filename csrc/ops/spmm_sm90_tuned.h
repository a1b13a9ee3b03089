// SPDX-License-Identifier: Apache-2.0
//
// What tuners found for products of spmm_sm90, in memory. No CUDA.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "common/hash.h"
#include "ops/spmm_sm90_choice.h"

namespace slope {

constexpr int kKnownDevices = 64;  // that are remembered; of others everything is asked anew

// What a split depends on.
struct Sm90Sizes {
  int device;
  bool bfloat16;
  int64_t rows, columns, tokens;  // rows and tokens are not 0; tokens a multiple of 8

  bool operator==(const Sm90Sizes&) const = default;
};

struct HashSm90Sizes {
  size_t operator()(const Sm90Sizes& sizes) const {
    return hash_of({sizes.device, sizes.bfloat16, sizes.rows, sizes.columns, sizes.tokens});
  }
};

// Splits by sizes. A loader tells those of a device before its first product; threads remember
// splits, and learn by a count that something changed.
class Sm90TunedSplits {
 public:
  void set_loader(SpmmSm90Loader loader) { loader_ = loader; }

  // Has the loader tell what is tuned on a device, unless it has. Several threads may do so at
  // once; none goes on before it has returned. It runs without a lock, since those who ask here may
  // hold what it waits for.
  void load(int device);

  void set(const Sm90Sizes& sizes, const std::optional<Sm90Split>& split);  // none: erases it
  std::optional<Sm90Split> find(const Sm90Sizes& sizes);
  void clear();  // and has the loader asked again

  int64_t changes() const { return changes_.load(std::memory_order_acquire); }

 private:
  std::mutex mutex_;
  std::unordered_map<Sm90Sizes, Sm90Split, HashSm90Sizes> splits_;
  std::array<bool, kKnownDevices> loaded_{};
  int64_t clears_ = 0;
  std::atomic<int64_t> changes_{0};
  std::atomic<SpmmSm90Loader> loader_{nullptr};
};

Sm90TunedSplits& sm90_tuned_splits();

}  // namespace slope
