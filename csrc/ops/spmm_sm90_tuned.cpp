// SPDX-License-Identifier: Apache-2.0
#include "ops/spmm_sm90_tuned.h"

namespace slope {

void Sm90TunedSplits::load(int device) {
  const SpmmSm90Loader loader = loader_;
  const bool is_known = device < kKnownDevices;
  int64_t clears = 0;
  {
    const std::lock_guard lock(mutex_);
    if (loader == nullptr || (is_known && loaded_[device])) {
      return;
    }
    clears = clears_;
  }
  const bool all_told = loader(device);
  const std::lock_guard lock(mutex_);
  if (all_told && is_known && clears == clears_) {
    loaded_[device] = true;
  }
}

void Sm90TunedSplits::set(const Sm90Sizes& sizes, const std::optional<Sm90Split>& split) {
  const std::lock_guard lock(mutex_);
  if (split) {
    splits_[sizes] = *split;
  } else {
    splits_.erase(sizes);
  }
  ++changes_;
}

std::optional<Sm90Split> Sm90TunedSplits::find(const Sm90Sizes& sizes) {
  const std::lock_guard lock(mutex_);
  const auto found = splits_.find(sizes);
  return found != splits_.end() ? std::optional(found->second) : std::nullopt;
}

void Sm90TunedSplits::clear() {
  const std::lock_guard lock(mutex_);
  splits_.clear();
  loaded_.fill(false);
  ++clears_;
  ++changes_;
}

Sm90TunedSplits& sm90_tuned_splits() {
  static auto* const splits = new Sm90TunedSplits;  // never destroyed: threads may ask to the end
  return *splits;
}

}  // namespace slope
