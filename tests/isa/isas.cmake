# Included by csrc/CMakeLists.txt for `nox -s amx`: what shows, on a processor without AMX and
# AVX-VNNI, that their kernels are right.
set(KT_TEST_ISA_DIR ${PROJECT_SOURCE_DIR}/tests/isa)
target_sources(kt_kernels PRIVATE ${KT_TEST_ISA_DIR}/table.cpp ${KT_TEST_ISA_DIR}/amx_trap.cpp)
kt_add_isa(isa/scalar.cpp)
kt_add_isa(isa/avx512_bf16.cpp ${KT_AVX512_BF16})
kt_add_isa(isa/amx.cpp ${KT_AMX})
kt_add_isa(${KT_TEST_ISA_DIR}/amx_emulated.cpp ${KT_AVX512_BF16})
kt_add_isa(${KT_TEST_ISA_DIR}/avx_vnni_512vl.cpp
  -mavx2 -mfma -mf16c -mavx512f -mavx512vl -mavx512vnni)
