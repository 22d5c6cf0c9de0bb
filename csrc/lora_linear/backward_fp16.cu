#include "backward_sm90.cuh"

template cudaError_t lora::backward<lora::Fp16>(const lora::BackwardArguments&, cudaStream_t);
