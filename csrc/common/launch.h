// The host side of a kernel: tensor maps, and a persistent launch of at most one CTA per SM.
#pragma once

#include <cstdint>
#include <type_traits>

#include "pipeline.h"

#ifdef LORA_EMULATE
#include "../emulate/launch.h"
#else

#include <cudaTypedefs.h>

#include <algorithm>
#include <atomic>

namespace lora {

// cuTensorMapEncodeTiled of the driver, found through the runtime: nothing links libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(usable ? function : nullptr);
  }();
  return encoder;
}

// Describes row-major matrices in boxes of one panel. `error` keeps the first failure.
template <class Element>
struct TensorMaps {
  cudaError_t error = cudaSuccess;

  template <class Matrix>
  TensorMap operator()(const Matrix& matrix, int rows, int columns) {
    TensorMap map{};
    if (matrix.address == 0) return map;  // a tensor this call does without
    const auto encode = tensor_map_encoder();
    if (encode == nullptr) {
      error = cudaErrorInsufficientDriver;
      return map;
    }
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t pitch[] = {static_cast<cuuint64_t>(matrix.row_stride) * 2};
    const cuuint32_t box[] = {kPanel, kPanel}, step[] = {1, 1};
    const CUresult result =
        encode(&map,
               std::is_same_v<Element, Bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
               2, reinterpret_cast<void*>(matrix.address), sizes, pitch, box, step,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) error = cudaErrorInvalidValue;
    return map;
  }
};

// Launches kKernel for `items`, each the work of a cluster of `ctas`, on the current device, which
// is asked for its SM count and told of the shared memory once; neither call synchronises or
// touches the stream.
template <auto kKernel, class Parameters>
cudaError_t launch(const Parameters& parameters, int items, int ctas, cudaStream_t stream) {
  constexpr int kDevices = 64;
  static std::atomic<int> sm_counts[kDevices];  // of this kernel's devices; 0: not asked yet
  int device;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (device >= kDevices) return cudaErrorInvalidDevice;
  int sms = sm_counts[device];
  if (sms == 0) {
    if (const cudaError_t error =
            cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) {
      return error;
    }
    if (const cudaError_t error = cudaFuncSetAttribute(
            kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) {
      return error;
    }
    sm_counts[device] = sms;
  }
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
  return cudaLaunchKernelEx(&config, kKernel, parameters);
}

}  // namespace lora

#endif
