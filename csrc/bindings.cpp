// SPDX-License-Identifier: Apache-2.0
//
// slope_ext._C: what is no tensor op. No torch header, no tensor crosses this boundary.
//
// The plan cache lives in the op library, beside the ops that use it. Python loads that library
// first and hands over the address of its function table (connect).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops/spmm_sm90_choice.h"

namespace py = pybind11;

namespace {

// Facts fixed when the library was compiled. Versions are "" where CUDA was left out.
py::dict build_info() {
  py::dict info;
  info["cuda"] = SLOPE_CUDA_VERSION;
  info["cuda_archs"] = SLOPE_CUDA_ARCHS;
  info["torch_headers"] = SLOPE_TORCH_HEADERS;
  info["torch_target"] = SLOPE_TORCH_TARGET;
  info["compiler"] = SLOPE_COMPILER;
  return info;
}

// tile, first_rows and rest_tile of SpmmSm90Params.
using Sm90Choice = std::tuple<int, int64_t, int>;
using Sm90Clusters = std::array<int, slope::kSm90Tiles.size()>;

Sm90Choice choice_of(const slope::Sm90Split& split, int64_t rows) {
  return {split.first.tile, split.first_rows < rows ? split.first_rows : 0, split.rest.tile};
}

// What the own product for Hopper would choose for a device with so many multiprocessors and room
// for so many clusters of each tile.
Sm90Choice spmm_sm90_choice(int64_t tokens, int64_t rows, int64_t columns, int processors,
                            const Sm90Clusters& clusters) {
  return choice_of(slope::sm90_split({rows, columns, tokens}, {processors, clusters}), rows);
}

std::vector<Sm90Choice> spmm_sm90_candidates(int64_t tokens, int64_t rows, int64_t columns,
                                             int processors, const Sm90Clusters& clusters,
                                             double factor) {
  std::vector<Sm90Choice> found;
  for (const slope::Sm90Split& split :
       slope::sm90_candidates({rows, columns, tokens}, {processors, clusters}, factor)) {
    found.push_back(choice_of(split, rows));
  }
  return found;
}

// Whether a kernel that makes all rows starts early, and the microseconds that it takes.
std::tuple<bool, double> spmm_sm90_cut(int tile, int64_t tokens, int64_t rows, int64_t columns,
                                       int processors, const Sm90Clusters& clusters) {
  if (tile < 0 || tile >= static_cast<int>(slope::kSm90Tiles.size())) {
    throw py::index_error("spmm_sm90_cut: tile is no index into SPMM_SM90_TILES");
  }
  const slope::Sm90Cut cut = slope::sm90_cut(tile, {rows, columns, tokens}, {processors, clusters});
  return {cut.starts_early, cut.time};
}

void bind_choice(py::module_& m) {
  py::list tiles;
  for (const slope::Sm90Tile& tile : slope::kSm90Tiles) {
    tiles.append(py::make_tuple(tile.rows, tile.tokens, tile.cluster, tile.segments));
  }
  m.attr("SPMM_SM90_TILES") = py::tuple(tiles);
  m.def("spmm_sm90_choice", &spmm_sm90_choice, py::arg("tokens"), py::arg("rows"),
        py::arg("columns"), py::kw_only(), py::arg("processors"), py::arg("clusters"),
        "What the own product would choose on a device with so many multiprocessors and room for "
        "so many clusters of each tile at the same time: (tile, first_rows, rest_tile), indices "
        "into SPMM_SM90_TILES; first_rows 0: one kernel.");
  m.def("spmm_sm90_candidates", &spmm_sm90_candidates, py::arg("tokens"), py::arg("rows"),
        py::arg("columns"), py::kw_only(), py::arg("processors"), py::arg("clusters"),
        py::arg("factor"),
        "What spmm_sm90_choice names, then what else takes less than `factor` times as long as "
        "that by the same model of times, the sooner the earlier.");
  m.def("spmm_sm90_cut", &spmm_sm90_cut, py::arg("tile"), py::arg("tokens"), py::arg("rows"),
        py::arg("columns"), py::kw_only(), py::arg("processors"), py::arg("clusters"),
        "Of one kernel with this tile, an index into SPMM_SM90_TILES: whether it may start while "
        "the kernel before it ends, and the microseconds that it takes by the same model, inf "
        "where it is not to be chosen. Raises IndexError.");
}

}  // namespace

#ifdef USE_CUDA

#include "ops/spmm_plan.h"

namespace {

using slope::SpmmAlgorithm;
using slope::SpmmCacheApi;
using slope::SpmmProblem;

const SpmmCacheApi* api = nullptr;

const SpmmCacheApi& cache() {
  if (api == nullptr) {
    throw std::runtime_error("slope_ext._C: connect() has not been called");
  }
  return *api;
}

// Calls use(error); raises RuntimeError with what was written there if it returns null or false.
template <typename Use>
auto raising(Use use) {
  char error[SpmmCacheApi::kErrorBytes] = "";
  auto result = use(error);
  if (!result) {
    throw std::runtime_error(error);
  }
  return result;
}

// ---- what the op library asks Python -----------------------------------------------------

// Never destroyed: threads of torch may ask until the process ends.
py::function* chooser = nullptr;
py::function* loader = nullptr;

// Calls `ask` with the GIL; false if it raised: that is reported, or, if it is an interrupt, raised
// in the main thread once this call is through.
template <typename Ask>
bool ask_python(const char* what, const Ask& ask) {
  if (!Py_IsInitialized()) {
    return false;
  }
  const py::gil_scoped_acquire gil;
  try {
    ask();
    return true;
  } catch (py::error_already_set& error) {
    if (error.matches(PyExc_KeyboardInterrupt)) {
      PyErr_SetInterrupt();
    } else {
      error.discard_as_unraisable(what);
    }
    return false;
  }
}

SpmmAlgorithm choose(const SpmmProblem& problem, bool capturing) {
  SpmmAlgorithm algorithm;
  ask_python("slope_ext: choice of a cuSPARSELt algorithm",
             [&] { algorithm = (*chooser)(problem, capturing).cast<SpmmAlgorithm>(); });
  return algorithm;
}

bool load_tuned(int device) {
  return ask_python("slope_ext: reading the table of tuned products", [=] { (*loader)(device); });
}

void set_chooser(py::function function) {
  delete chooser;
  chooser = new py::function(std::move(function));
  cache().set_chooser(&choose);
}

void set_loader(py::function function) {
  delete loader;
  loader = new py::function(std::move(function));
  cache().native_set_loader(&load_tuned);
}

// ---- cache -------------------------------------------------------------------------------

py::dict info() {
  const auto facts = [] {
    const py::gil_scoped_release no_gil;  // a lane's thread may want it
    return cache().info();
  }();
  py::dict result;
  result["plans"] = facts.plans;
  result["capacity"] = facts.capacity;
  result["hits"] = facts.hits;
  result["misses"] = facts.misses;
  result["evictions"] = facts.evictions;
  return result;
}

std::vector<py::tuple> entries() {
  std::vector<slope::SpmmCacheEntry> found;
  {
    const py::gil_scoped_release no_gil;  // a lane's thread may want it
    found.resize(cache().entries(nullptr, 0) + 64);
    const int64_t count = cache().entries(found.data(), static_cast<int64_t>(found.size()));
    found.resize(std::min<size_t>(found.size(), count));
  }
  std::vector<py::tuple> result;
  for (const auto& entry : found) {
    result.push_back(py::make_tuple(entry.problem, entry.algorithm, entry.workspace_bytes));
  }
  return result;
}

std::tuple<int, int, int> cusparselt_version() {
  int32_t version[3];
  raising([&](char* error) { return cache().version(version, error); });
  return {version[0], version[1], version[2]};
}

// ---- a plan of a tuner ---------------------------------------------------------------------

class Plan {
 public:
  Plan(const SpmmProblem& problem, const SpmmAlgorithm& algorithm)
      : plan_(raising([&](char* error) { return cache().make(problem, algorithm, error); }),
              cache().free) {}

  void run(uintptr_t packed, uintptr_t x, uintptr_t bias, uintptr_t y, uintptr_t workspace,
           uintptr_t stream) {
    const auto address = [](uintptr_t value) { return reinterpret_cast<void*>(value); };
    const slope::SpmmOperands operands{address(packed), address(x), address(bias), address(y),
                                       address(workspace)};
    raising([&](char* error) {
      return cache().run(plan_.get(), operands, reinterpret_cast<cudaStream_t>(stream), error);
    });
  }
  int64_t workspace_bytes() const { return cache().workspace_bytes(plan_.get()); }
  int32_t algorithm_count() const {
    int32_t count = 0;
    raising([&](char* error) { return cache().algorithm_count(plan_.get(), count, error); });
    return count;
  }

 private:
  std::unique_ptr<slope::SpmmPlan, void (*)(slope::SpmmPlan*)> plan_;
};

void bind_plan_cache(py::module_& m) {
  py::class_<SpmmProblem>(m, "SpmmProblem", "What a plan is made for: Y = X W^T.")
      .def(py::init([](int64_t rows, int64_t columns, int64_t tokens, int32_t device, bool bfloat16,
                       bool bias, bool accumulate) {
             return SpmmProblem{rows, columns, tokens, device, bfloat16, bias, accumulate};
           }),
           py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("tokens"), py::arg("device"),
           py::arg("bfloat16"), py::arg("bias") = false, py::arg("accumulate") = false)
      .def_readonly("rows", &SpmmProblem::rows)
      .def_readonly("columns", &SpmmProblem::columns)
      .def_readonly("tokens", &SpmmProblem::tokens)
      .def_readonly("device", &SpmmProblem::device)
      .def_property_readonly("bfloat16", [](const SpmmProblem& p) { return p.bfloat16 != 0; })
      .def_property_readonly("bias", [](const SpmmProblem& p) { return p.bias != 0; })
      .def_property_readonly("accumulate", [](const SpmmProblem& p) { return p.accumulate != 0; });
  py::class_<SpmmAlgorithm>(m, "SpmmAlgorithm", "How cuSPARSELt is to do it.")
      .def(py::init([](int32_t id, int32_t split_k, int32_t split_k_mode) {
             return SpmmAlgorithm{id, split_k, split_k_mode};
           }),
           py::arg("id") = 0, py::arg("split_k") = 1, py::arg("split_k_mode") = 0)
      .def_readonly("id", &SpmmAlgorithm::id)
      .def_readonly("split_k", &SpmmAlgorithm::split_k)
      .def_readonly("split_k_mode", &SpmmAlgorithm::split_k_mode);
  py::class_<Plan>(m, "SpmmPlan", "A plan outside of the cache; of the thread that made it.")
      .def(py::init<const SpmmProblem&, const SpmmAlgorithm&>())
      .def("run", &Plan::run, "Launches the product; addresses as integers.")
      .def_property_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def_property_readonly("algorithm_count", &Plan::algorithm_count);
  m.def("connect", [](uintptr_t address) {
    const auto function = reinterpret_cast<decltype(&slope_spmm_cache_api)>(address);
    api = function();
  });
  m.def("plan_cache_set_chooser", &set_chooser);
  m.def("plan_cache_info", &info);
  m.def("plan_cache_entries", &entries);
  m.def("plan_cache_set_capacity", [](int64_t plans) { cache().set_capacity(plans); });
  m.def("plan_cache_clear", [] { cache().clear(); });
  m.def("cusparselt_version", &cusparselt_version);
  m.def("driver_version", [] { return cache().driver_version(); });
  m.def("metadata_writer", [](int device) { return cache().metadata_writer(device); });
  m.attr("OVERREAD_BYTES") = slope::kOverreadBytes;
  m.def("native_runs", [](int device) { return cache().native_runs(device); });
  m.def(
      "native_tuned",
      [](int device, bool bfloat16, int64_t tokens, int64_t rows, int64_t columns,
         const Sm90Choice& choice) {
        const auto [tile, first_rows, rest_tile] = choice;
        return cache().native_tuned(
            {device, bfloat16, rows, columns, tokens, first_rows, tile, rest_tile});
      },
      py::kw_only(), py::arg("device"), py::arg("bfloat16"), py::arg("tokens"), py::arg("rows"),
      py::arg("columns"), py::arg("choice"),
      "From now on the own product of these sizes is made as spmm_sm90_choice's result says, with "
      "tile -1 by the model of times again; tokens up to the next multiple of 8. The device must "
      "be current. False: not possible.");
  m.def(
      "native_forget", [] { cache().native_forget(); },
      "Forgets what native_tuned was told, and has the loader tell it again.");
  m.def(
      "native_set_loader", &set_loader,
      "What tells the op library, by native_tuned, all that is tuned on a device; called with its "
      "ordinal before the own product's first there.");
}

}  // namespace

#endif  // USE_CUDA

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of slope_ext, how the own product chooses, the plan cache of CUDA builds.";
  m.def("build_info", &build_info,
        "Facts of this build: dict with str values for cuda, cuda_archs (comma-separated), "
        "torch_headers, torch_target and compiler; empty strings where CUDA was left out.");
  bind_choice(m);
#ifdef USE_CUDA
  bind_plan_cache(m);
#endif
}
