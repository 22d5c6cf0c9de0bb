// A CUDA runtime on the stub driver: the functions that the CUDA extension calls, and no more.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>

#include "record.h"

extern int stub_multiprocessors;

// Of the one parameter of a kernel, a struct by value: a host object does not tell its size.
uint32_t stub_struct_bytes;

enum { kKernels = 64 };
static struct {
  const void* host;
  const char* name;
  int loaded;
} kernels[kKernels];
static int kernel_count;

// --- What nvcc's host code calls when the extension is loaded ------------------------------------

void** __cudaRegisterFatBinary(void* image) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void** handle) {}
void __cudaUnregisterFatBinary(void** handle) {}
void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name,
                            int limit, uint3* tid, uint3* bid, dim3* block, dim3* grid, int* warp) {
  if (kernel_count == kKernels) abort();
  kernels[kernel_count].host = host;
  kernels[kernel_count++].name = name;
}

// The <<<...>>> syntax, which the extension does not use.
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  abort();
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  abort();
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) { abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** parameters,
                               size_t shared, cudaStream_t stream) {
  abort();
}

// --- What the extension calls --------------------------------------------------------------------

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorNotSupported;
  *value = stub_multiprocessors;
  return cudaSuccess;
}

// As a real runtime, it makes the device's context current for this thread.
static _Thread_local int bound;
cudaError_t cudaSetDevice(int device) {
  bound = 1;
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// A stream may always be capturing here: kernels load in the relaxed mode alone, and launches come
// after it has ended.
static _Thread_local enum cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  const enum cudaStreamCaptureMode previous = capture_mode;
  capture_mode = *mode;
  *mode = previous;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, enum cudaFuncAttribute attribute,
                                 int value) {
  if (capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  for (int i = 0; i < kernel_count; ++i) kernels[i].loaded |= kernels[i].host == function;
  return cudaSuccess;
}

extern CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                       const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                       const cuuint32_t* steps, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                       CUtensorMapFloatOOBfill fill) {
  if (!bound) return CUDA_ERROR_INVALID_CONTEXT;
  return cuTensorMapEncodeTiled(map, type, rank, address, sizes, strides, box, steps, interleave,
                                swizzle, promotion, fill);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult* found) {
  if (strcmp(symbol, "cuTensorMapEncodeTiled") != 0) return cudaErrorNotSupported;
  *function = encode;
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) { return "cudaErrorStub"; }
const char* cudaGetErrorString(cudaError_t error) { return "refused by the stub runtime"; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** parameters) {
  if (capture_mode != cudaStreamCaptureModeGlobal) return cudaErrorStreamCaptureWrongThread;
  // All kernels load at the first launch, lest one should do so inside a capture.
  for (int i = 0; i < kernel_count; ++i) {
    if (!kernels[i].loaded) return cudaErrorNotReady;
  }
  Launch* launch = stub_new_launch();
  launch->function = (uint64_t)function;
  for (int i = 0; i < kernel_count; ++i) {
    if (kernels[i].host == function) {
      strncpy(launch->kernel, kernels[i].name, sizeof launch->kernel - 1);
    }
  }
  memcpy(launch->grid, &config->gridDim, sizeof launch->grid);
  memcpy(launch->block, &config->blockDim, sizeof launch->block);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      memcpy(launch->cluster, &config->attrs[i].val.clusterDim, sizeof launch->cluster);
    }
  }
  launch->shared_bytes = config->dynamicSmemBytes;
  launch->stream = (uint64_t)config->stream;
  launch->parameter_bytes = stub_struct_bytes;
  memcpy(launch->parameters, parameters[0], stub_struct_bytes);
  return cudaSuccess;
}
