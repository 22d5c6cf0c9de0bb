#include "backward_sm90.cuh"

template lora::Failure lora::backward<lora::Fp16, float>(const lora::BackwardArguments&,
                                                         cudaStream_t);
