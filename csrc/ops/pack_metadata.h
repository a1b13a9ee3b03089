// SPDX-License-Identifier: Apache-2.0
//
// The metadata part of the packed operand, for whoever has the bitmask.
#pragma once

#include <cuda_runtime.h>

#include "common/torch_stable.h"

namespace slope {

// Words of metadata of a weight [rows, columns] for spmm_sm90.
int64_t metadata_words(int64_t rows, int64_t columns);

// words <- those of a contiguous bitmask [rows, columns / 8] on the current device.
void write_words(const char* op, const Tensor& bitmask, void* words, cudaStream_t stream);

// Bytes of metadata of a 16-bit weight [rows, columns], in whole tiles of the hardware.
int64_t metadata_bytes(int64_t rows, int64_t columns);

// What the products take: 16-bit types; a weight [rows, columns] by cuSPARSELt in multiples of 16
// and 16, by spmm_sm90 of 8 and 32.
bool is_half(ScalarType dtype);
bool fits_plan(int64_t rows, int64_t columns);
bool fits_native(int64_t rows, int64_t columns);

// Raises RuntimeError "slope::<op>: ..." unless cuSPARSELt takes a weight [rows, columns] with such
// values, named `name`.
void check_packable(const char* op, const char* name, const Tensor& values, int64_t rows,
                    int64_t columns);

// Raises RuntimeError "slope::<op>: <name> ..." unless `metadata` is that of a weight [rows,
// columns] in form, int32 words or uint8, on the device of `beside` (named `beside_name`).
void check_metadata(const char* op, const char* name, const Tensor& metadata,
                    const char* beside_name, const Tensor& beside, int64_t rows, int64_t columns);

// metadata <- that of a contiguous bitmask [rows, columns / 8] on the current device. By the own
// kernel where that is known to write what the library would, else by the library.
void write_metadata(const char* op, const Tensor& bitmask, void* metadata, cudaStream_t stream);

// Which of both writes where the shape allows a choice: 1 the own kernel, 0 the library, -1 not
// tested yet on this device.
int metadata_writer(int device);

}  // namespace slope
