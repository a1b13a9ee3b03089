// SPDX-License-Identifier: Apache-2.0
//
// slope_ext._C: what is no tensor op. No torch header, no tensor crosses this boundary.
#include <pybind11/pybind11.h>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of slope_ext.";
  m.def("build_info", &build_info,
        "Facts of this build: dict with str values for cuda, cuda_archs (comma-separated), "
        "torch_headers, torch_target and compiler; empty strings where CUDA was left out.");
}
