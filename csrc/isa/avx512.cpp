#define KT_ISA avx512
#include "simd/avx512.hpp"

#include "isa/kernels-inl.hpp"
