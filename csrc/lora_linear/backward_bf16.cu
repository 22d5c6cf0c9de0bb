#include "backward_sm90.cuh"

template cudaError_t lora::backward<lora::Bf16>(const lora::BackwardArguments&, cudaStream_t);
