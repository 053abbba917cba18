#define KT_ISA amx
#include "simd/amx.hpp"

#include "isa/kernels-inl.hpp"
