// The host side of a kernel: tensor maps, and a persistent launch of at most one CTA per SM.
#pragma once

#include <cudaTypedefs.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "device.h"
#include "pipeline.h"

namespace lora {

inline std::string name_of(CUresult result) {
  static const auto find = driver_function<PFN_cuGetErrorName_v6000>("cuGetErrorName", 6000);
  const char* name = nullptr;
  if (find != nullptr) find(result, &name);
  return name != nullptr ? name : "CUresult " + std::to_string(result);
}

template <class T>
constexpr CUtensorMapDataType kDataType =
    std::is_same_v<T, float>  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
    : std::is_same_v<T, Bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

// Describes row-major matrices in boxes as wide as a panel, for the current device, which is
// prepared first: the driver encodes in a context. `failure` keeps the last one.
struct TensorMaps {
  int sms = 0;
  Failure failure = prepare_device(kSharedBytes, sms);

  template <class T, class Matrix>
  TensorMap of(const Matrix& matrix, int rows, int columns, int box_rows = kPanel) {
    TensorMap map{};
    // A tensor that this call does without has no address.
    if (matrix.address == 0 || !failure.empty()) return map;
    static const auto encode =
        driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled", 12000);
    if (encode == nullptr) {
      failure = "the driver has no cuTensorMapEncodeTiled";
      return map;
    }
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t pitch[] = {static_cast<cuuint64_t>(matrix.row_stride) *
                                (kRowBytes / kRowElements<T>)};
    const cuuint32_t box[] = {kRowElements<T>, static_cast<cuuint32_t>(box_rows)}, step[] = {1, 1};
    const CUresult result =
        encode(&map, kDataType<T>, 2, reinterpret_cast<void*>(matrix.address), sizes, pitch, box,
               step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
      failure = "cuTensorMapEncodeTiled of " + std::to_string(rows) + " x " +
                std::to_string(columns) + ", row pitch " + std::to_string(pitch[0]) +
                " bytes: " + name_of(result);
    }
    return map;
  }
};

// Launches kKernel for `items`, each the work of a cluster of `ctas`, on at most one CTA per SM.
template <auto kKernel, class Parameters>
Failure launch(const Parameters& parameters, int items, int ctas, int sms, cudaStream_t stream) {
  static_cast<void>(kKernelListed<kKernel>);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas * std::min(items, std::max(sms / ctas, 1)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  return failure_of("cudaLaunchKernelEx", cudaLaunchKernelEx(&config, kKernel, parameters));
}

}  // namespace lora
