#define KT_ISA avx512_bf16
#include "simd/avx512.hpp"

#include "isa/kernels-inl.hpp"
