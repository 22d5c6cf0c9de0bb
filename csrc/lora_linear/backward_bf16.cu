#include "backward_sm90.cuh"

template lora::Failure lora::backward<lora::Bf16, lora::Bf16>(const lora::BackwardArguments&,
                                                              cudaStream_t);
