// The host side of an emulated launch; `options` stand for the device.
#pragma once

#include <algorithm>

#include "machine.h"

namespace lora {

struct TensorMaps {
  int sms = 2 * emulate::Machine::options().clusters;  // clusters are of two at most
  Failure failure;

  template <class T, class Matrix>
  TensorMap of(const Matrix& matrix, int rows, int columns, int box_rows = kPanel) {
    constexpr int kBytes = kRowBytes / kRowElements<T>;
    const int64_t pitch = matrix.row_stride * kBytes;
    if (matrix.address % 16 != 0 || pitch % 16 != 0) failure = "misaligned";
    return {reinterpret_cast<uint8_t*>(matrix.address), rows, columns, pitch, kBytes, box_rows};
  }
};

template <auto kKernel, class Parameters>
Failure launch(const Parameters& parameters, int items, int ctas, int, cudaStream_t) {
  const int clusters = std::min(items, emulate::Machine::options().clusters);
  emulate::Machine::run(clusters, ctas, kThreads, [&] { kKernel(parameters); });
  return {};
}

}  // namespace lora
