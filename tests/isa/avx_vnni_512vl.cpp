// The source of isa/avx_vnni.cpp, built with the AVX-512VL encoding of the same instruction.
#define KT_ISA avx_vnni_512vl
#include "simd/avx2.hpp"

#include "isa/kernels-inl.hpp"
