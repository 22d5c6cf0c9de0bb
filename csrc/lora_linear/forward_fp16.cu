#include "forward_sm90.cuh"

template lora::Failure lora::forward<lora::Fp16, lora::Fp16>(const lora::ForwardArguments&,
                                                             cudaStream_t);
