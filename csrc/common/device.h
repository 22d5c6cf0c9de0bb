// The device a launch goes to: its context, and what is done once there before the first launch.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <vector>

#include "types.h"

namespace lora {

inline Failure failure_of(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return {};
  return std::string(what) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
         ")";
}

// A function of the driver, found through the runtime: nothing links libcuda.
template <class Function>
Function driver_function(const char* name, int version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found);
  const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return reinterpret_cast<Function>(usable ? function : nullptr);
}

// Returns why the driver cannot serve the runtime that is linked in; the absence of any driver is
// for others to report.
inline Failure why_no_driver() {
  constexpr int kRuntime = CUDART_VERSION / 1000;
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return {};
  if (driver / 1000 >= kRuntime) return {};
  return "it is built with CUDA " + std::to_string(kRuntime) +
         ", which needs an NVIDIA driver of " + (kRuntime == 12 ? "525" : "580") +
         " or newer; the one here is for CUDA " + std::to_string(driver / 1000) + "." +
         std::to_string(driver % 1000 / 10);
}

// Every kernel of the extension; `kKernelListed<kernel>` enters one when the extension is loaded.
inline std::vector<const void*>& kernels() {
  static std::vector<const void*> all;
  return all;
}
template <auto kKernel>
inline const bool kKernelListed =
    (kernels().push_back(reinterpret_cast<const void*>(kKernel)), true);

// Loads all kernels on the current device and lets them have their shared memory. Modules load at
// first use, and that synchronises: a forward that ran before a capture must have done it for the
// backward inside. Where the capture comes first the relaxed mode lets this thread load there.
inline Failure load_kernels(int shared_bytes) {
  auto mode = cudaStreamCaptureModeRelaxed;
  if (const auto error = cudaThreadExchangeStreamCaptureMode(&mode)) {
    return failure_of("cudaThreadExchangeStreamCaptureMode", error);
  }
  cudaError_t error = cudaSuccess;
  for (const void* kernel : kernels()) {
    if (error != cudaSuccess) break;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  return failure_of("cudaFuncSetAttribute", error);
}

// Makes the current device's context current for the driver too, which a thread that has not yet
// called the runtime lacks (cudaFree(0) would do it as well, but not in a capture), and at the
// first call for a device loads the kernels there. Writes its number of SMs; touches no stream.
inline Failure prepare_device(int shared_bytes, int& sms) {
  constexpr int kDevices = 64;
  static std::atomic<int> sm_counts[kDevices];  // 0: not prepared yet
  thread_local int bound = -1;
  int device;
  if (const auto error = cudaGetDevice(&device)) {
    const Failure reason = why_no_driver();
    return reason.empty() ? failure_of("cudaGetDevice", error) : reason;
  }
  if (device >= kDevices) return "more than 64 devices";
  if (device != bound) {
    if (const auto error = cudaSetDevice(device)) return failure_of("cudaSetDevice", error);
    bound = device;
  }
  sms = sm_counts[device];
  if (sms != 0) return {};
  if (const auto error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) {
    return failure_of("cudaDeviceGetAttribute", error);
  }
  const Failure failure = load_kernels(shared_bytes);
  if (failure.empty()) sm_counts[device] = sms;
  return failure;
}

}  // namespace lora
