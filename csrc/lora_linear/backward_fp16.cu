#include "backward_sm90.cuh"

template lora::Failure lora::backward<lora::Fp16, lora::Fp16>(const lora::BackwardArguments&,
                                                              cudaStream_t);
