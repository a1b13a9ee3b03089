// SPDX-License-Identifier: Apache-2.0
#include "ops/spmm_plan.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <list>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "common/cuda_check.h"
#include "common/hash.h"
#include "common/per_thread.h"
#include "ops/pack_metadata.h"
#include "ops/spmm_sm90.h"

namespace slope {
namespace {

constexpr const char* kOp = "spmm";  // the op family: several ops share plans
constexpr uint32_t kAlignment = 16;  // bytes

}  // namespace

// ---- one plan ------------------------------------------------------------------------------

SpmmPlan::SpmmPlan(const cusparselt::Handle& handle, const SpmmProblem& problem,
                   const SpmmAlgorithm& algorithm)
    : SpmmPlan(Unmade{}, handle, problem, algorithm) {
  // From here on the destructor runs if something is refused
  const auto& lt = cusparselt::api();
  const auto made = [this](int status, const char* what) {
    cusparselt::check(status, kOp, what);
    ++initialised_;
  };
  const auto set = [&](cusparselt::AlgAttribute attribute, int value, const char* what) {
    cusparselt::check(
        lt.MatmulAlgSetAttribute(&handle_, &selection_, attribute, &value, sizeof(value)), kOp,
        what);
  };
  const cudaDataType type = problem.bfloat16 != 0 ? CUDA_R_16BF : CUDA_R_16F;

  made(lt.StructuredDescriptorInit(&handle_, &a_, problem.rows, problem.columns, problem.columns,
                                   kAlignment, type, cusparselt::kRowMajor, cusparselt::k50Percent),
       "descriptor of the weight");
  made(lt.DenseDescriptorInit(&handle_, &b_, problem.columns, problem.tokens, problem.columns,
                              kAlignment, type, cusparselt::kColumnMajor),
       "descriptor of x");
  made(lt.DenseDescriptorInit(&handle_, &d_, problem.rows, problem.tokens, problem.rows, kAlignment,
                              type, cusparselt::kColumnMajor),
       "descriptor of y");
  made(lt.MatmulDescriptorInit(&handle_, &matmul_, cusparselt::kNonTranspose,
                               cusparselt::kNonTranspose, &a_, &b_, &d_, &d_,
                               cusparselt::kCompute32F),
       "descriptor of the product");
  if (problem.bias != 0) {
    // The epilogue is chosen when the plan is made; run() sets the address that it reads
    set_bias(&handle_);
  }
  made(lt.MatmulAlgSelectionInit(&handle_, &selection_, &matmul_, 0), "algorithm selection");
  if (algorithm.id != 0) {
    set(cusparselt::kConfigId, algorithm.id, "algorithm id");
  }
  if (algorithm.split_k != 1) {
    set(cusparselt::kSplitK, algorithm.split_k, "split-k");
  }
  if (algorithm.split_k_mode != 0) {
    set(cusparselt::kSplitKMode, algorithm.split_k_mode, "split-k mode");
  }
  made(lt.MatmulPlanInit(&handle_, &plan_, &matmul_, &selection_), "plan");
  cusparselt::check(lt.MatmulGetWorkspace(&handle_, &plan_, &workspace_bytes_), kOp,
                    "workspace size");
}

SpmmPlan::SpmmPlan(Unmade, const cusparselt::Handle& handle, const SpmmProblem& problem,
                   const SpmmAlgorithm& algorithm)
    : handle_(handle), problem_(problem), algorithm_(algorithm) {}

SpmmPlan::~SpmmPlan() {
  // Statuses are of no use here: nothing can be done about them.
  const auto& lt = cusparselt::api();
  if (initialised_ > 5) lt.MatmulPlanDestroy(&plan_);
  if (initialised_ > 4) lt.MatmulAlgSelectionDestroy(&selection_);
  if (initialised_ > 2) lt.MatDescriptorDestroy(&d_);
  if (initialised_ > 1) lt.MatDescriptorDestroy(&b_);
  if (initialised_ > 0) lt.MatDescriptorDestroy(&a_);
}

void SpmmPlan::set_bias(const void* bias) {
  cusparselt::check(cusparselt::api().MatmulDescSetAttribute(
                        &handle_, &matmul_, cusparselt::kBiasPointer, &bias, sizeof(bias)),
                    kOp, "bias");
}

void SpmmPlan::run(const SpmmOperands& operands, cudaStream_t stream) {
  if (problem_.bias != 0) {
    set_bias(operands.bias);
  }
  const float alpha = 1.0f;
  const float beta = problem_.accumulate != 0 ? 1.0f : 0.0f;
  cusparselt::check(
      cusparselt::api().Matmul(&handle_, &plan_, &alpha, operands.packed, operands.x, &beta,
                               operands.y, operands.y, operands.workspace, &stream, 1),
      kOp, "product");
}

int32_t SpmmPlan::algorithm_count() const {
  int count = 0;
  cusparselt::check(cusparselt::api().MatmulAlgGetAttribute(
                        &handle_, &selection_, cusparselt::kConfigMaxId, &count, sizeof(count)),
                    kOp, "number of algorithms");
  return count;
}

// ---- the cache -----------------------------------------------------------------------------

namespace {

struct HashProblem {
  size_t operator()(const SpmmProblem& problem) const {
    return hash_of({problem.rows, problem.columns, problem.tokens,
                    problem.bfloat16 | problem.bias << 1 | problem.accumulate << 2});
  }
};

// What a thread has on a device: a handle, and its plans, the latest used first. Only the thread
// itself changes them: clear() and set_capacity() take effect in its next call, since the library
// does not say that one thread may destroy what another runs. The mutex is for the Python module's
// looks at the plans.
struct Lane {
  using Recent = std::list<std::pair<SpmmProblem, std::shared_ptr<SpmmPlan>>>;

  cusparselt::Handle handle;
  std::mutex mutex;
  Recent recent;
  std::unordered_map<SpmmProblem, Recent::iterator, HashProblem> by_problem;
  int64_t hits = 0, misses = 0, evictions = 0;
  int64_t generation = 0;  // of the last clear() that took effect

  explicit Lane(int /*device*/) {
    cusparselt::check(cusparselt::api().Init(&handle), kOp, "initialisation");
  }
};

using Lanes = PerThread<Lane>;

std::atomic<int64_t> capacity{1024};
std::atomic<int64_t> generation{0};  // how often clear() was called
std::atomic<SpmmChooser> chooser{nullptr};

// Drops the plans used longest ago; the lane must be locked.
void trim(Lane& lane) {
  const auto room = static_cast<size_t>(capacity);
  while (lane.recent.size() > room) {
    lane.by_problem.erase(lane.recent.back().first);
    lane.recent.pop_back();
    ++lane.evictions;
  }
}

// Drops what was there before the last clear(); the lane must be locked.
void follow_clear(Lane& lane) {
  if (const int64_t current = generation; lane.generation != current) {
    lane.by_problem.clear();
    lane.recent.clear();
    lane.generation = current;
  }
}

std::shared_ptr<SpmmPlan> make_plan(const cusparselt::Handle& handle, const SpmmProblem& problem,
                                    const SpmmAlgorithm& wanted) {
  if (wanted != SpmmAlgorithm{}) {
    try {
      return std::make_shared<SpmmPlan>(handle, problem, wanted);
    } catch (const std::runtime_error&) {
      // A table of another shape or release may name what is not offered here.
    }
  }
  return std::make_shared<SpmmPlan>(handle, problem, SpmmAlgorithm{});
}

}  // namespace

const cusparselt::Handle& spmm_handle(int32_t device) { return Lanes::get(device).handle; }

std::shared_ptr<SpmmPlan> spmm_plan(const SpmmProblem& problem, cudaStream_t stream) {
  Lane& lane = Lanes::get(problem.device);
  {
    const std::lock_guard lock(lane.mutex);
    follow_clear(lane);
    const auto found = lane.by_problem.find(problem);
    if (found != lane.by_problem.end()) [[likely]] {
      ++lane.hits;
      lane.recent.splice(lane.recent.begin(), lane.recent, found->second);
      trim(lane);  // set_capacity() may have been called
      return lane.recent.front().second;
    }
    ++lane.misses;
  }

  // Unlocked: the chooser takes Python's lock, whose holder may be looking at this lane
  const SpmmChooser choose = chooser;
  const SpmmAlgorithm wanted =
      choose == nullptr ? SpmmAlgorithm{} : choose(problem, is_capturing(stream, kOp));
  auto plan = make_plan(lane.handle, problem, wanted);

  const std::lock_guard lock(lane.mutex);
  lane.recent.emplace_front(problem, plan);
  lane.by_problem[problem] = lane.recent.begin();
  trim(lane);
  return plan;
}

// ---- for the Python module -----------------------------------------------------------------

namespace {

template <typename Use>
void each_lane(Use use) {
  Lanes::each([&use](Lane& lane) {
    const std::lock_guard lock(lane.mutex);
    use(lane);
  });
}

SpmmCacheInfo info() {
  SpmmCacheInfo sum{};
  sum.capacity = capacity;
  each_lane([&sum](const Lane& lane) {
    sum.plans += lane.generation == generation ? static_cast<int64_t>(lane.recent.size()) : 0;
    sum.hits += lane.hits;
    sum.misses += lane.misses;
    sum.evictions += lane.evictions;
  });
  return sum;
}

int64_t entries(SpmmCacheEntry* out, int64_t room) {
  int64_t count = 0;
  each_lane([&](const Lane& lane) {
    if (lane.generation != generation) {
      return;
    }
    for (const auto& [problem, plan] : lane.recent) {
      if (count < room) {
        out[count] = {problem, plan->algorithm(), static_cast<int64_t>(plan->workspace_bytes())};
      }
      ++count;
    }
  });
  return count;
}

void set_capacity(int64_t plans) { capacity = std::max<int64_t>(plans, 1); }

void clear() { ++generation; }

// Runs `action`; what it throws becomes text.
template <typename Action>
bool guarded(char* error, Action action) {
  try {
    action();
    return true;
  } catch (const std::exception& exception) {
    std::strncpy(error, exception.what(), SpmmCacheApi::kErrorBytes - 1);
    error[SpmmCacheApi::kErrorBytes - 1] = '\0';
    return false;
  }
}

bool version(int32_t (&version)[3], char* error) {
  return guarded(error, [&] { std::copy_n(cusparselt::api().version, 3, version); });
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

SpmmPlan* make(const SpmmProblem& problem, const SpmmAlgorithm& algorithm, char* error) {
  SpmmPlan* plan = nullptr;
  guarded(error, [&] { plan = new SpmmPlan(spmm_handle(problem.device), problem, algorithm); });
  return plan;
}

bool run(SpmmPlan* plan, const SpmmOperands& operands, cudaStream_t stream, char* error) {
  return guarded(error, [&] { plan->run(operands, stream); });
}

bool algorithm_count(const SpmmPlan* plan, int32_t& count, char* error) {
  return guarded(error, [&] { count = plan->algorithm_count(); });
}

}  // namespace
}  // namespace slope

const slope::SpmmCacheApi* slope_spmm_cache_api() {
  static const slope::SpmmCacheApi api{
      .set_chooser = [](slope::SpmmChooser function) { slope::chooser = function; },
      .info = slope::info,
      .entries = slope::entries,
      .set_capacity = slope::set_capacity,
      .clear = slope::clear,
      .version = slope::version,
      .driver_version = slope::driver_version,
      .metadata_writer = slope::metadata_writer,
      .native_runs = slope::spmm_sm90_runs,
      .native_tuned = slope::tune_spmm_sm90,
      .native_forget = slope::forget_tuned_spmm_sm90,
      .native_set_loader = slope::set_spmm_sm90_loader,
      .make = slope::make,
      .run = slope::run,
      .workspace_bytes =
          [](const slope::SpmmPlan* plan) { return static_cast<int64_t>(plan->workspace_bytes()); },
      .algorithm_count = slope::algorithm_count,
      .free = [](slope::SpmmPlan* plan) { delete plan; },
  };
  return &api;
}
