#define KT_ISA avx_vnni
#include "simd/avx2.hpp"

#include "isa/kernels-inl.hpp"
