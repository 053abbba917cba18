#define KT_ISA avx2
#include "simd/avx2.hpp"

#include "isa/kernels-inl.hpp"
