// SPDX-License-Identifier: Apache-2.0
//
// cuSPARSELt, opened at run time: what is used of its C interface, no more. No header of the
// library is needed to build, and the copy that torch has mapped is the one that runs.
//
// Sparse operand (16-bit types): [values | metadata], values row-major [rows, columns / 2].
#pragma once

#include <cuda_runtime.h>
#include <library_types.h>

#include <cstdint>
#include <string>

namespace slope::cusparselt {

// Opaque structs: 512 bytes each in 0.8 to 0.10. The slack costs nothing and survives a release
// that needs more. They must stay where they are as long as anything made from them lives.
struct alignas(64) Opaque {
  uint8_t data[2048] = {};
};
struct Handle : Opaque {};
struct MatDescriptor : Opaque {};
struct MatmulDescriptor : Opaque {};
struct AlgSelection : Opaque {};
struct Plan : Opaque {};

// Values of the library's enums.
enum Order : int { kColumnMajor = 1, kRowMajor = 2 };
enum Operation : int { kNonTranspose = 0 };
enum Compute : int { kCompute32F = 2 };
enum Sparsity : int { k50Percent = 0 };
enum AlgAttribute : int { kConfigId = 0, kConfigMaxId = 1, kSplitK = 3, kSplitKMode = 4 };
enum MatmulAttribute : int { kBiasPointer = 8 };

// name, then the argument types; every function returns a status, 0 for success.
#define SLOPE_CUSPARSELT_FUNCTIONS(X)                                                             \
  X(GetProperty, libraryPropertyType, int*)                                                       \
  X(Init, Handle*)                                                                                \
  X(DenseDescriptorInit, const Handle*, MatDescriptor*, int64_t, int64_t, int64_t, uint32_t,      \
    cudaDataType, Order)                                                                          \
  X(StructuredDescriptorInit, const Handle*, MatDescriptor*, int64_t, int64_t, int64_t, uint32_t, \
    cudaDataType, Order, Sparsity)                                                                \
  X(MatDescriptorDestroy, const MatDescriptor*)                                                   \
  X(MatmulDescriptorInit, const Handle*, MatmulDescriptor*, Operation, Operation,                 \
    const MatDescriptor*, const MatDescriptor*, const MatDescriptor*, const MatDescriptor*,       \
    Compute)                                                                                      \
  X(MatmulDescSetAttribute, const Handle*, MatmulDescriptor*, MatmulAttribute, const void*,       \
    size_t)                                                                                       \
  X(MatmulAlgSelectionInit, const Handle*, AlgSelection*, const MatmulDescriptor*, int)           \
  X(MatmulAlgSelectionDestroy, const AlgSelection*)                                               \
  X(MatmulAlgSetAttribute, const Handle*, AlgSelection*, AlgAttribute, const void*, size_t)       \
  X(MatmulAlgGetAttribute, const Handle*, const AlgSelection*, AlgAttribute, void*, size_t)       \
  X(MatmulPlanInit, const Handle*, Plan*, const MatmulDescriptor*, const AlgSelection*)           \
  X(MatmulPlanDestroy, const Plan*)                                                               \
  X(MatmulGetWorkspace, const Handle*, const Plan*, size_t*)                                      \
  X(Matmul, const Handle*, const Plan*, const void*, const void*, const void*, const void*,       \
    const void*, void*, void*, cudaStream_t*, int32_t)                                            \
  X(SpMMACompressedSize2, const Handle*, const MatDescriptor*, size_t*, size_t*)                  \
  X(SpMMACompress2, const Handle*, const MatDescriptor*, int, Operation, const void*, void*,      \
    void*, cudaStream_t)

struct Api {
#define SLOPE_DECLARE(name, ...) int (*name)(__VA_ARGS__) = nullptr;
  SLOPE_CUSPARSELT_FUNCTIONS(SLOPE_DECLARE)
#undef SLOPE_DECLARE
  const char* (*GetErrorString)(int) = nullptr;
  int version[3] = {};  // major, minor, patch
};

// The library's functions. Raises RuntimeError where it is missing or older than 0.8; the message
// says what to install.
const Api& api();

// Whether api() returns.
bool available();

// Raises RuntimeError "slope::<op>: cuSPARSELt <what>: ..." unless status is success.
void check(int status, const char* op, const char* what);

}  // namespace slope::cusparselt
