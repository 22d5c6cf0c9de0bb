// The host side of an emulated launch; `options` stand for the device.
#pragma once

#include <algorithm>

#include "machine.h"

namespace lora {

template <class Element>
struct TensorMaps {
  int sms = 0;
  Failure failure;

  template <class Matrix>
  TensorMap operator()(const Matrix& matrix, int rows, int columns) {
    if (matrix.address % 16 != 0 || matrix.row_stride % 8 != 0) failure = "misaligned";
    return {reinterpret_cast<uint8_t*>(matrix.address), rows, columns, matrix.row_stride * 2};
  }
};

template <auto kKernel, class Parameters>
Failure launch(const Parameters& parameters, int items, int ctas, int, cudaStream_t) {
  const int clusters = std::min(items, emulate::Machine::options().clusters);
  emulate::Machine::run(clusters, ctas, kThreads, [&] { kKernel(parameters); });
  return {};
}

}  // namespace lora
