// A CUDA driver without a GPU: an sm_90 whose kernels do nothing and whose launches are recorded.
//
// As much of the driver API as Triton's NVIDIA driver and launchers use. What needs no GPU is real:
// arguments are packed as the compiled kernel's own description of its parameters says.
#include <cuda.h>
#include <elf.h>
#include <stdlib.h>

#include "record.h"

Record stub_record;
int stub_arch = 90, stub_multiprocessors = 132;

enum { kParameters = 128, kKparamInfo = 0x17 };

typedef struct {
  char name[128];
  int count;
  uint32_t offset[kParameters], size[kParameters], bytes;
} Kernel;

// --- Modules: only the parameters of a cubin's kernels are read ----------------------------------

// Reads the .nv.info section of a kernel: records of a format byte, a type byte and two bytes that
// are the value or the length of what follows. A parameter is index, ordinal | offset << 16 and a
// word with the size from bit 18 on.
static void read_parameters(Kernel* kernel, const uint8_t* info, size_t length) {
  for (size_t at = 0; at + 4 <= length;) {
    const uint32_t more = info[at] == 4 ? info[at + 2] | info[at + 3] << 8 : 0;
    if (info[at] == 4 && info[at + 1] == kKparamInfo) {
      uint32_t word[3];
      memcpy(word, info + at + 4, sizeof word);
      const uint32_t ordinal = word[1] & 0xFFFF;
      if (ordinal >= kParameters) abort();
      kernel->offset[ordinal] = word[1] >> 16;
      kernel->size[ordinal] = word[2] >> 18;
      if (kernel->count <= (int)ordinal) kernel->count = ordinal + 1;
      const uint32_t end = kernel->offset[ordinal] + kernel->size[ordinal];
      if (kernel->bytes < end) kernel->bytes = end;
    }
    at += 4 + more;
  }
  if (kernel->bytes > kParameterBytes) abort();
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  ++stub_record.modules;
  *module = (CUmodule)image;  // Triton keeps the cubin as long as the module
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const uint8_t* image = (const uint8_t*)module;
  const Elf64_Ehdr* elf = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + elf->e_shoff);
  const char* names = (const char*)image + sections[elf->e_shstrndx].sh_offset;
  Kernel* kernel = calloc(1, sizeof *kernel);
  strncpy(kernel->name, name, sizeof kernel->name - 1);
  *function = (CUfunction)kernel;
  static const char kPrefix[] = ".nv.info.";
  for (int i = 0; i < elf->e_shnum; ++i) {
    const char* section = names + sections[i].sh_name;
    if (strncmp(section, kPrefix, sizeof kPrefix - 1) == 0 &&
        strcmp(section + sizeof kPrefix - 1, name) == 0) {
      read_parameters(kernel, image + sections[i].sh_offset, sections[i].sh_size);
      return CUDA_SUCCESS;
    }
  }
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuModuleUnload(CUmodule module) {
  --stub_record.modules;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// --- Launches and tensor maps --------------------------------------------------------------------

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  const Kernel* kernel = (const Kernel*)function;
  Launch* launch = stub_new_launch();
  memcpy(launch->kernel, kernel->name, sizeof launch->kernel);
  launch->function = (uint64_t)function;
  const uint32_t grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const uint32_t block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  memcpy(launch->grid, grid, sizeof grid);
  memcpy(launch->block, block, sizeof block);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      memcpy(launch->cluster, &config->attrs[i].value.clusterDim, sizeof launch->cluster);
    }
  }
  launch->shared_bytes = config->sharedMemBytes;
  launch->stream = (uint64_t)config->hStream;
  launch->parameter_bytes = kernel->bytes;
  memset(launch->parameters, 0, kernel->bytes);  // what lies between two parameters
  for (int i = 0; i < kernel->count; ++i) {
    memcpy(launch->parameters + kernel->offset[i], parameters[i], kernel->size[i]);
  }
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  __atomic_fetch_add(&stub_record.maps, 1, __ATOMIC_RELAXED);
  if (rank != 2 || (uint64_t)address % 16 != 0 || strides[0] % 16 != 0 || sizes[0] == 0 ||
      sizes[1] == 0 || box[0] > 256 || box[1] > 256) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const Map facts = {
      (uint64_t)address, {sizes[0], sizes[1]}, strides[0], {box[0], box[1]}, rank, type, swizzle};
  memset(map, 0, sizeof *map);
  memcpy(map, &facts, sizeof facts);
  return CUDA_SUCCESS;
}

// Any address passes for one of the device.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  __atomic_fetch_add(&stub_record.pointer_queries, 1, __ATOMIC_RELAXED);
  *(CUdeviceptr*)value = address;
  return CUDA_SUCCESS;
}

// --- The device and its context ------------------------------------------------------------------

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

// From 13.2 on Triton no longer edits the bytes of a tensor map itself.
CUresult cuDriverGetVersion(int* version) {
  *version = 13020;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = stub_arch / 10;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = stub_arch % 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = stub_multiprocessors;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:  // what else is asked for is a size: of shared memory, registers, clocks
      *value = 227 * 1024;
  }
  return CUDA_SUCCESS;
}

static CUcontext current = (CUcontext)1;

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "refused by the stub driver";
  return CUDA_SUCCESS;
}
