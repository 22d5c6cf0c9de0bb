#include "forward_sm90.cuh"

template lora::Failure lora::forward<lora::Bf16, lora::Bf16>(const lora::ForwardArguments&,
                                                             cudaStream_t);
