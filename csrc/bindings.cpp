// lora_kernels._C: addresses, sizes and a stream in; an exception out if the launch fails.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "common/device.h"
#include "lora_linear/lora_linear.h"

namespace py = pybind11;

namespace {

using lora::Bf16, lora::Fp16;

template <class Arguments>
using Launcher = lora::Failure (*)(const Arguments&, cudaStream_t);

// (address, row stride in elements); the address 0 is an absent matrix.
lora::Matrix matrix(const py::tuple& pair) {
  return {pair[0].cast<uintptr_t>(), pair[1].cast<int64_t>()};
}

// (enabled, threshold, key low word, key high word, first group, address of the seed or 0)
lora::Dropout dropout(const py::tuple& values) {
  lora::Dropout result;
  result.enabled = values[0].cast<bool>();
  result.threshold = values[1].cast<uint32_t>();
  result.key_low = values[2].cast<uint32_t>();
  result.key_high = values[3].cast<uint32_t>();
  result.first_group = values[4].cast<uint32_t>();
  result.seed = reinterpret_cast<const uint32_t*>(values[5].cast<uintptr_t>());
  return result;
}

// (m, 2^e)
lora::Scale scale(const py::tuple& pair) {
  const float power = pair[1].cast<float>();
  return {pair[0].cast<float>(), 1 / power, power};
}

void check(const char* what, const lora::Failure& failure) {
  if (!failure.empty()) throw std::runtime_error("lora_linear " + (what + (": " + failure)));
}

// Returns the instance for x's and the adapters' types.
template <class Arguments>
auto by_types(bool is_bf16, bool fp32_adapters, Launcher<Arguments> bf16,
              Launcher<Arguments> bf16_fp32, Launcher<Arguments> fp16,
              Launcher<Arguments> fp16_fp32) {
  return is_bf16 ? (fp32_adapters ? bf16_fp32 : bf16) : (fp32_adapters ? fp16_fp32 : fp16);
}

void forward(bool is_bf16, bool fp32_adapters, int m, int n, int k, int r, const py::tuple& x,
             const py::tuple& w, const py::tuple& a, const py::tuple& b, uintptr_t bias,
             const py::tuple& y, const py::tuple& p, uintptr_t workspace, const py::tuple& factors,
             const py::tuple& drop, uintptr_t stream) {
  lora::ForwardArguments arguments;
  arguments.m = m, arguments.n = n, arguments.k = k, arguments.r = r;
  arguments.x = matrix(x), arguments.w = matrix(w), arguments.a = matrix(a);
  arguments.b = matrix(b), arguments.y = matrix(y), arguments.p = matrix(p);
  arguments.bias = bias;
  arguments.workspace = workspace;
  arguments.scale = scale(factors);
  arguments.dropout = dropout(drop);
  const auto run = by_types<lora::ForwardArguments>(
      is_bf16, fp32_adapters, lora::forward<Bf16, Bf16>, lora::forward<Bf16, float>,
      lora::forward<Fp16, Fp16>, lora::forward<Fp16, float>);
  check("forward", run(arguments, reinterpret_cast<cudaStream_t>(stream)));
}

void backward(bool is_bf16, bool fp32_adapters, int m, int n, int k, int r, const py::tuple& dy,
              const py::tuple& x, const py::tuple& w, const py::tuple& a, const py::tuple& b,
              const py::tuple& p, const py::tuple& q, const py::tuple& dx, const py::tuple& da,
              const py::tuple& db, bool adds_dx, uintptr_t workspace, const py::tuple& factors,
              const py::tuple& drop, uintptr_t stream) {
  lora::BackwardArguments arguments;
  arguments.m = m, arguments.n = n, arguments.k = k, arguments.r = r;
  arguments.dy = matrix(dy), arguments.x = matrix(x), arguments.w = matrix(w);
  arguments.a = matrix(a), arguments.b = matrix(b), arguments.p = matrix(p);
  arguments.q = matrix(q), arguments.dx = matrix(dx), arguments.da = matrix(da);
  arguments.db = matrix(db);
  arguments.need_dx = arguments.dx.address != 0;
  arguments.need_da = arguments.da.address != 0;
  arguments.need_db = arguments.db.address != 0;
  arguments.adds_dx = adds_dx;
  arguments.workspace = workspace;
  arguments.scale = scale(factors);
  arguments.dropout = dropout(drop);
  const auto run = by_types<lora::BackwardArguments>(
      is_bf16, fp32_adapters, lora::backward<Bf16, Bf16>, lora::backward<Bf16, float>,
      lora::backward<Fp16, Fp16>, lora::backward<Fp16, float>);
  check("backward", run(arguments, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("INTERFACE") = 3;  // one more for each change to what these functions take
  module.def("lora_linear_forward", &forward);
  module.def("lora_linear_backward", &backward);
  module.def("why_not", [] {
    const lora::Failure failure = lora::why_no_driver();
    return failure.empty() ? std::nullopt : std::optional(failure);
  });
}
