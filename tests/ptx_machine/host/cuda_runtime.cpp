// A CUDA runtime without a GPU: linked with the objects that nvcc makes of csrc/, it hands every
// launch, with its parameters as the host code laid them out, to a handler.
//
// Device number n has n multiprocessors.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "../core/tensor_map.h"

namespace {

using LaunchHandler = int (*)(const char* kernel, unsigned ctas, unsigned cluster, unsigned threads,
                              unsigned shared_bytes, void** parameters);
LaunchHandler launch_handler = nullptr;
int device = 1;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

// Refuses what the driver would refuse.
CUresult encode(CUtensorMap* made, CUtensorMapDataType type, cuuint32_t rank, void* address,
                const cuuint64_t* sizes, const cuuint64_t* pitches, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const unsigned bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  const unsigned span[] = {1u << 30, 32, 64, 128};
  if (rank < 1 || rank > 5 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
  bool right =
      (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
       type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32) &&
      reinterpret_cast<uintptr_t>(made) % 64 == 0 &&
      reinterpret_cast<uintptr_t>(address) % 16 == 0 && address != nullptr &&
      interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
      box[0] * bytes % 16 == 0 && box[0] * bytes <= span[swizzle];
  ptx::TensorMap map{};
  map.magic = ptx::TensorMap::kMagic;
  map.address = reinterpret_cast<uintptr_t>(address);
  map.rank = static_cast<uint8_t>(rank);
  map.element_bytes = static_cast<uint8_t>(bytes);
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.element = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16  ? ptx::TensorMap::kBf16
                : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? ptx::TensorMap::kF16
                                                          : ptx::TensorMap::kF32;
  for (unsigned i = 0; i < rank; ++i) {
    right = right && sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 &&
            steps[i] == 1;
    map.size[i] = static_cast<uint32_t>(sizes[i]);
    map.box[i] = static_cast<uint16_t>(box[i]);
    if (i + 1 < rank) {
      right = right && pitches[i] % 16 == 0 && pitches[i] < uint64_t{1} << 40;
      map.pitch[i] = pitches[i];
    }
  }
  if (!right) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(made, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void ptx_machine_attach(LaunchHandler handler,
                                                               int multiprocessors) {
  launch_handler = handler;
  device = multiprocessors;
}

cudaError_t cudaGetDevice(int* number) {
  *number = device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
  return number == device ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = number;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int) {
  return kernels().count(kernel) ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *function = reinterpret_cast<void*>(&encode);
  if (found != nullptr) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "a CUDA error";
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** parameters) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster = config->attrs[i].val.clusterDim.x;
    }
  }
  const int failed =
      launch_handler(kernels().at(kernel).c_str(), config->gridDim.x, cluster, config->blockDim.x,
                     static_cast<unsigned>(config->dynamicSmemBytes), parameters);
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

// What nvcc's own code calls to register the kernels.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernels()[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return cudaErrorInvalidValue;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorInvalidValue;
}

}  // extern "C"
