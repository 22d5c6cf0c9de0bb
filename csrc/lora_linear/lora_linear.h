// The arguments of both directions, and what a launch of one returns. Strides are in elements.
//
// Notation: x[M,K] W[N,K] A[R,K] B[N,R] bias[N] y[M,N], P[M,R] = m*keep(x)*A^T, Q[M,R] = m*dy*B,
// where s/(1-p) = m*2^e and `keep` zeroes what dropout drops.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/types.h"

namespace lora {

// A row-major matrix in device memory; its address and row pitch are multiples of 16 bytes.
struct Matrix {
  uintptr_t address = 0;
  int64_t row_stride = 0;
};

struct ForwardArguments {
  int m = 0, n = 0, k = 0, r = 0;
  Matrix x, w, a, b, y, p;
  uintptr_t bias = 0;       // a multiple of 4; 0: none
  uintptr_t workspace = 0;  // 3 + 2*ceil(M/256) zeroed words that no other running launch uses
  Scale scale;
  Dropout dropout;
};

struct BackwardArguments {
  int m = 0, n = 0, k = 0, r = 0;
  Matrix dy, x, w, a, b, p, q, dx, da, db;  // q is scratch; x is absent without da, p without db
  bool need_dx = false, need_da = false, need_db = false;
  bool adds_dx = false;  // to what is there
  uintptr_t workspace = 0;
  Scale scale;
  Dropout dropout;
};

// y = x*W^T + 2^e*(P*B^T) (+ bias) and P, in one launch on `stream` of the current device.
template <class Element, class Adapter>
Failure forward(const ForwardArguments& arguments, cudaStream_t stream);

// The needed ones of dx = dy*W + 2^e*keep(Q*A), da = 2^e*Q^T*keep(x) and db = 2^e*dy^T*P, in one
// launch. With adds_dx, dx is rounded and then added to what is there, which is rounded again.
template <class Element, class Adapter>
Failure backward(const BackwardArguments& arguments, cudaStream_t stream);

}  // namespace lora
