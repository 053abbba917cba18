#define KT_ISA avx512_vnni
#include "simd/avx512.hpp"

#include "isa/kernels-inl.hpp"
