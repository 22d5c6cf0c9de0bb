#include "forward_sm90.cuh"

template cudaError_t lora::forward<lora::Bf16>(const lora::ForwardArguments&, cudaStream_t);
