// SPDX-License-Identifier: Apache-2.0
//
// pack and pack_metadata on CUDA.
//
// The metadata layout is private to cuSPARSELt, so the library's word is law. It depends on the
// mask alone, so the library can always be asked: it compresses a surrogate that is 1 where the
// mask keeps. The own kernel writes the two layouts that are known, much faster; it is
// used on a device once its bytes have been compared with the library's there.
#include "ops/pack.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "common/check_operands.h"
#include "common/cuda_check.h"
#include "common/cusparselt.h"
#include "common/round_up.h"
#include "common/torch_stable.h"
#include "ops/compress.h"
#include "ops/pack_metadata.h"
#include "ops/spmm_plan.h"

namespace slope {
namespace {

constexpr int64_t kMultiple = 16;  // of rows and columns, for the library's 16-bit operands
constexpr int64_t kMaxRows = int64_t{64} * 65535;

// Bytes [written, size) are read by nobody; zeros make equal operands equal bytes.
void clear_slack(const char* op, void* metadata, int64_t written, int64_t size,
                 cudaStream_t stream) {
  if (written < size) {
    check_cuda(
        cudaMemsetAsync(static_cast<uint8_t*>(metadata) + written, 0, size - written, stream), op);
  }
}

// ---- by the library ----------------------------------------------------------------------

void write_by_library(const char* op, const Tensor& bitmask, void* metadata, cudaStream_t stream) {
  const int64_t rows = bitmask.size(0);
  const int64_t columns = bitmask.size(1) * kColumnsPerByte;

  // Surrogate: 1 where kept
  Tensor ones = torch::stable::new_empty(bitmask, {rows, columns / 2}, ScalarType::Half);
  torch::stable::fill_(ones, 1.0);
  const Tensor surrogate = torch::stable::new_empty(bitmask, {rows, columns}, ScalarType::Half);
  const CompressParams params{
      .dense = surrogate.mutable_data_ptr(),
      .values = ones.mutable_data_ptr(),
      .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
      .elements = rows * columns,
      .element_bytes = 2,
  };
  check_cuda(launch_decompress(params, stream), op);

  // Compress it, keep the metadata
  const auto& lt = cusparselt::api();
  const auto& handle = spmm_handle(bitmask.get_device());
  cusparselt::MatDescriptor weight;
  cusparselt::check(
      lt.StructuredDescriptorInit(&handle, &weight, rows, columns, columns, kMultiple, CUDA_R_16F,
                                  cusparselt::kRowMajor, cusparselt::k50Percent),
      op, "descriptor of the weight");
  size_t bytes = 0, scratch_bytes = 0;
  int status = lt.SpMMACompressedSize2(&handle, &weight, &bytes, &scratch_bytes);
  const auto value_bytes = static_cast<size_t>(rows * columns);
  if (status == 0) {
    const auto room = static_cast<int64_t>(std::max<size_t>(bytes, 1));
    const auto scratch_room = static_cast<int64_t>(std::max<size_t>(scratch_bytes, 1));
    const Tensor compressed = torch::stable::new_empty(bitmask, {room});
    const Tensor scratch = torch::stable::new_empty(bitmask, {scratch_room});
    // The library leaves gaps where no tile of its own ends with the weight
    check_cuda(cudaMemsetAsync(compressed.mutable_data_ptr(), 0, bytes, stream), op);
    status = lt.SpMMACompress2(&handle, &weight, 1, cusparselt::kNonTranspose,
                               surrogate.const_data_ptr(), compressed.mutable_data_ptr(),
                               scratch.mutable_data_ptr(), stream);
    if (status == 0) {
      check(bytes >= value_bytes &&
                static_cast<int64_t>(bytes - value_bytes) <= metadata_bytes(rows, columns),
            "slope::", op, ": cuSPARSELt's operand of [", rows, ", ", columns, "] has ", bytes,
            " bytes, more than is known here");
      check_cuda(
          cudaMemcpyAsync(metadata,
                          static_cast<const uint8_t*>(compressed.const_data_ptr()) + value_bytes,
                          bytes - value_bytes, cudaMemcpyDeviceToDevice, stream),
          op);
      clear_slack(op, metadata, static_cast<int64_t>(bytes - value_bytes),
                  metadata_bytes(rows, columns), stream);
    }
  }
  lt.MatDescriptorDestroy(&weight);
  cusparselt::check(status, op, "compression");
}

// ---- by the own kernel, once it has shown itself right -------------------------------------

MetadataLayout layout_of(int device, const char* op) {
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), op);
  return major == 9 ? MetadataLayout::kSm90 : MetadataLayout::kSm80;
}

bool own_kernel_takes(MetadataLayout layout, int64_t rows, int64_t columns) {
  const bool sm90 = layout == MetadataLayout::kSm90;
  return rows % (sm90 ? 64 : 128) == 0 && columns % (sm90 ? 32 : 128) == 0 && rows <= kMaxRows;
}

void write_by_own_kernel(const char* op, const Tensor& bitmask, void* metadata,
                         MetadataLayout layout, cudaStream_t stream) {
  const PackMetadataParams params{
      .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
      .metadata = metadata,
      .rows = bitmask.size(0),
      .columns = bitmask.size(1) * kColumnsPerByte,
      .layout = layout,
  };
  check_cuda(launch_pack_metadata(params, stream), op);
  clear_slack(op, metadata, params.rows * params.columns / 8,
              metadata_bytes(params.rows, params.columns), stream);
}

// Both writers on a random mask: are the bytes the same?
bool writes_as_library(const char* op, const Tensor& like, int64_t rows, int64_t columns,
                       MetadataLayout layout, cudaStream_t stream) {
  constexpr std::array<uint8_t, 6> kNibbles{3, 5, 6, 9, 10, 12};
  std::vector<uint8_t> mask(rows * columns / kColumnsPerByte);
  uint32_t random = 0x2545f491;
  for (uint8_t& byte : mask) {
    random = random * 1664525u + 1013904223u;
    byte = static_cast<uint8_t>(kNibbles[(random >> 8) % 6] | kNibbles[(random >> 20) % 6] << 4);
  }
  const int64_t bytes = metadata_bytes(rows, columns);
  const Tensor bitmask = torch::stable::new_empty(like, {rows, columns / kColumnsPerByte});
  const Tensor own = torch::stable::new_empty(like, {bytes});
  const Tensor library = torch::stable::new_empty(like, {bytes});
  check_cuda(cudaMemcpyAsync(bitmask.mutable_data_ptr(), mask.data(), mask.size(),
                             cudaMemcpyHostToDevice, stream),
             op);
  write_by_own_kernel(op, bitmask, own.mutable_data_ptr(), layout, stream);
  write_by_library(op, bitmask, library.mutable_data_ptr(), stream);

  std::vector<uint8_t> own_bytes(bytes), library_bytes(bytes);
  check_cuda(cudaMemcpyAsync(own_bytes.data(), own.const_data_ptr(), bytes, cudaMemcpyDeviceToHost,
                             stream),
             op);
  check_cuda(cudaMemcpyAsync(library_bytes.data(), library.const_data_ptr(), bytes,
                             cudaMemcpyDeviceToHost, stream),
             op);
  check_cuda(cudaStreamSynchronize(stream), op);
  return own_bytes == library_bytes;
}

constexpr int kMaxDevices = 64;
constexpr int kUntested = -1;

// By device: 1 the own kernel is right, 0 it is not, kUntested.
std::array<std::atomic<int>, kMaxDevices>& verdicts() {
  static auto* const instance = [] {
    auto* const made = new std::array<std::atomic<int>, kMaxDevices>;
    for (auto& verdict : *made) {
      verdict = kUntested;
    }
    return made;
  }();
  return *instance;
}

// Two threads may both test; they find the same. No lock is held meanwhile: the allocator may want
// Python's.
bool own_kernel_is_right(const char* op, const Tensor& like, MetadataLayout layout,
                         cudaStream_t stream) {
  const int device = like.get_device();
  if (device >= kMaxDevices) {
    return false;
  }
  std::atomic<int>& verdict = verdicts()[device];
  if (verdict == kUntested) {
    if (is_capturing(stream, op)) {
      return false;  // the test waits for the device
    }
    const bool right = writes_as_library(op, like, 256, 256, layout, stream) &&
                       writes_as_library(op, like, 384, 896, layout, stream);
    if (verdict.exchange(right ? 1 : 0) == kUntested && !right) {
      aoti_torch_warn("pack", "pack.cpp", __LINE__,
                      "slope_ext: this cuSPARSELt has a metadata layout on this GPU that is not "
                      "known here; masks are packed by the library, which is slow");
    }
  }
  return verdict == 1;
}

void check_multiples(const char* op, const char* name, int64_t rows, int64_t columns) {
  check(fits_plan(rows, columns), "slope::", op, ": ", name,
        " must be of a weight with out and in in multiples of ", kMultiple,
        " for the sparse tensor cores, got out x in = ", rows, " x ", columns);
}

// ---- ops -----------------------------------------------------------------------------------

Tensor pack(const Tensor& values, const Tensor& bitmask) {
  constexpr const char* kOp = "pack";
  check_compressed(kOp, values, bitmask);
  const int64_t rows = values.size(0);
  const int64_t columns = values.size(1) * 2;
  check_packable(kOp, "values", values, rows, columns);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device());

  const int64_t value_bytes = values.numel() * 2;
  const int64_t size = value_bytes + metadata_bytes(rows, columns);
  Tensor allocated = torch::stable::new_empty(bitmask, {size + kOverreadBytes});
  const Tensor packed = torch::stable::narrow(allocated, 0, 0, size);
  if (values.numel() == 0) {
    return packed;
  }
  const Tensor source = torch::stable::contiguous(values);
  const Tensor mask = contiguous_16b(bitmask);
  auto* const bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const cudaStream_t stream = current_stream(values, kOp);
  check_cuda(cudaMemcpyAsync(bytes, source.const_data_ptr(), value_bytes, cudaMemcpyDeviceToDevice,
                             stream),
             kOp);
  write_metadata(kOp, mask, bytes + value_bytes, stream);
  return packed;
}

void pack_metadata(const Tensor& bitmask, Tensor metadata) {
  constexpr const char* kOp = "pack_metadata";
  check(bitmask.dim() == 2, "slope::", kOp, ": bitmask must have 2 dimensions, got shape ",
        ShapeOf{bitmask});
  check(bitmask.scalar_type() == ScalarType::Byte, "slope::", kOp, ": bitmask must be uint8");
  const int64_t rows = bitmask.size(0);
  const int64_t columns = bitmask.size(1) * kColumnsPerByte;
  const bool words = metadata.scalar_type() == ScalarType::Int;
  if (words) {
    check(fits_native(rows, columns), "slope::", kOp,
          ": bitmask must be of a weight with out in multiples of 8 and in in multiples of 32 for "
          "int32 metadata, got out x in = ",
          rows, " x ", columns);
  } else {
    check_multiples(kOp, "bitmask", rows, columns);
  }
  check_metadata(kOp, "metadata", metadata, "bitmask", bitmask, rows, columns);
  check(reinterpret_cast<uintptr_t>(metadata.const_data_ptr()) % 16 == 0, "slope::", kOp,
        ": metadata must start at a multiple of 16 bytes");
  if (bitmask.numel() == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(bitmask.get_device());
  const auto write = words ? &write_words : &write_metadata;
  write(kOp, contiguous_16b(bitmask), metadata.mutable_data_ptr(), current_stream(bitmask, kOp));
}

}  // namespace

int64_t metadata_words(int64_t rows, int64_t columns) {
  return round_up(rows, 64) * round_up(columns, 256) / 32;
}

void write_words(const char* op, const Tensor& bitmask, void* words, cudaStream_t stream) {
  const PackWordsParams params{
      .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
      .words = static_cast<uint32_t*>(words),
      .rows = bitmask.size(0),
      .columns = bitmask.size(1) * kColumnsPerByte,
  };
  check_cuda(launch_pack_words(params, stream), op);
}

int64_t metadata_bytes(int64_t rows, int64_t columns) {
  return std::max(round_up(rows, 32) * round_up(columns, 64),
                  round_up(rows, 64) * round_up(columns, 32)) /
         8;
}

bool is_half(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

bool fits_plan(int64_t rows, int64_t columns) {
  return rows % kMultiple == 0 && columns % kMultiple == 0;
}

bool fits_native(int64_t rows, int64_t columns) { return rows % 8 == 0 && columns % 32 == 0; }

void check_packable(const char* op, const char* name, const Tensor& values, int64_t rows,
                    int64_t columns) {
  check(is_half(values.scalar_type()), "slope::", op, ": ", name,
        " must be float16 or bfloat16 for the sparse tensor cores");
  check_multiples(op, name, rows, columns);
}

void check_metadata(const char* op, const char* name, const Tensor& metadata,
                    const char* beside_name, const Tensor& beside, int64_t rows, int64_t columns) {
  check(metadata.is_cuda() && metadata.get_device() == beside.get_device(), "slope::", op, ": ",
        name, " must be on the same device as ", beside_name);
  const bool words = metadata.scalar_type() == ScalarType::Int;
  const int64_t size = words ? metadata_words(rows, columns) : metadata_bytes(rows, columns);
  check((words || metadata.scalar_type() == ScalarType::Byte) && metadata.dim() == 1 &&
            metadata.size(0) == size && metadata.is_contiguous(),
        "slope::", op, ": ", name, " must be contiguous ", words ? "int32" : "uint8", " [", size,
        "], got ", ShapeOf{metadata});
}

void write_metadata(const char* op, const Tensor& bitmask, void* metadata, cudaStream_t stream) {
  const MetadataLayout layout = layout_of(bitmask.get_device(), op);
  if (own_kernel_takes(layout, bitmask.size(0), bitmask.size(1) * kColumnsPerByte) &&
      own_kernel_is_right(op, bitmask, layout, stream)) {
    write_by_own_kernel(op, bitmask, metadata, layout, stream);
  } else {
    write_by_library(op, bitmask, metadata, stream);
  }
}

int metadata_writer(int device) {
  return 0 <= device && device < kMaxDevices ? verdicts()[device].load() : 0;
}

}  // namespace slope

STABLE_TORCH_LIBRARY_IMPL(slope, CUDA, m) {
  m.impl("pack", TORCH_BOX(&slope::pack));
  m.impl("pack_metadata", TORCH_BOX(&slope::pack_metadata));
}
