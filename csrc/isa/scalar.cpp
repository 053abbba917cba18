#define KT_ISA scalar
#include "simd/scalar.hpp"

#include "isa/kernels-inl.hpp"
