// SPDX-License-Identifier: Apache-2.0
#include "common/cusparselt.h"

#include <dlfcn.h>

#include "common/torch_stable.h"

namespace slope::cusparselt {
namespace {

constexpr const char* kSoname = "libcusparseLt.so.0";
constexpr int kOldest[2] = {0, 8};

Api load() {
  void* library = dlopen(kSoname, RTLD_NOW | RTLD_NOLOAD);  // the copy that torch mapped
  if (library == nullptr) {
    library = dlopen(kSoname, RTLD_NOW);
  }
  slope::check(library != nullptr, "slope: ", kSoname,
               " is not found: install nvidia-cusparselt-cu13 (or -cu12, as your torch) >= 0.8");

  Api loaded;
  std::string missing;
#define SLOPE_RESOLVE(name, ...)                                                             \
  loaded.name = reinterpret_cast<decltype(loaded.name)>(dlsym(library, "cusparseLt" #name)); \
  missing += loaded.name == nullptr ? " cusparseLt" #name : "";
  SLOPE_CUSPARSELT_FUNCTIONS(SLOPE_RESOLVE)
  SLOPE_RESOLVE(GetErrorString)
#undef SLOPE_RESOLVE

  // The opaque structs of releases before 0.8 are larger: those would write past ours.
  if (loaded.GetProperty != nullptr) {
    for (int part = 0; part < 3; ++part) {
      loaded.GetProperty(static_cast<libraryPropertyType>(part), &loaded.version[part]);
    }
  }
  const bool old = loaded.version[0] == kOldest[0] && loaded.version[1] < kOldest[1];
  slope::check(missing.empty() && !old, "slope: cuSPARSELt ", loaded.version[0], ".",
               loaded.version[1], ".", loaded.version[2],
               " is too old: install nvidia-cusparselt >= 0.8", missing.empty() ? "" : "; lacks",
               missing);
  return loaded;
}

}  // namespace

const Api& api() {
  static const Api loaded = load();
  return loaded;
}

bool available() {
  static const bool loaded = [] {
    try {
      api();
      return true;
    } catch (const std::runtime_error&) {
      return false;
    }
  }();
  return loaded;
}

void check(int status, const char* op, const char* what) {
  slope::check(status == 0, "slope::", op, ": cuSPARSELt ", what, ": ",
               status == 0 ? "" : api().GetErrorString(status));
}

}  // namespace slope::cusparselt
