# torch_stable: the LibTorch stable ABI as one INTERFACE target.
#
# No find_package(Torch): that pulls in ATen's flags and its CUDA probing. The stable ABI needs the
# include directory, two libraries, and the version of the ABI to target.
#
#   TORCH_TARGET_VERSION   0xMMmm000000000000, one byte major, one byte minor: 2.11 -> 0x020b...
#   --no-as-needed         libtorch.so must stay in DT_NEEDED though no symbol of it is used here:
#                          on CUDA builds of torch it is what makes libtorch_cuda.so reachable.

set(SLOPE_TORCH_TARGET "2.11" CACHE STRING "Oldest torch release that the op library must load on")

execute_process(
  COMMAND "${SLOPE_PYTHON}" -c
          "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE torch_root
  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT torch_root)
  message(FATAL_ERROR "slope_ext: no torch in ${SLOPE_PYTHON}. Install torch >= ${SLOPE_TORCH_TARGET} "
                      "first and build without isolation: pip install --no-build-isolation .")
endif()

file(READ "${torch_root}/include/torch/headeronly/version.h" torch_version_h)
string(REGEX MATCH "TORCH_VERSION_MAJOR ([0-9]+)" _ "${torch_version_h}")
set(torch_major "${CMAKE_MATCH_1}")
string(REGEX MATCH "TORCH_VERSION_MINOR ([0-9]+)" _ "${torch_version_h}")
set(SLOPE_TORCH_HEADERS "${torch_major}.${CMAKE_MATCH_1}")
if(SLOPE_TORCH_HEADERS VERSION_LESS SLOPE_TORCH_TARGET)
  message(FATAL_ERROR "slope_ext: torch ${SLOPE_TORCH_HEADERS} found, >= ${SLOPE_TORCH_TARGET} needed.")
endif()

string(REPLACE "." ";" target_parts "${SLOPE_TORCH_TARGET}")
list(GET target_parts 0 target_major)
list(GET target_parts 1 target_minor)
math(EXPR target_hex "(${target_major} << 56) | (${target_minor} << 48)" OUTPUT_FORMAT HEXADECIMAL)

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${torch_root}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${target_hex})
target_link_directories(torch_stable INTERFACE "${torch_root}/lib")
target_link_options(torch_stable INTERFACE "-Wl,--no-as-needed" "-ltorch" "-ltorch_cpu"
                    "-Wl,--as-needed")
