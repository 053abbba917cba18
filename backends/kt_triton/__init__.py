"""Kernels for experts on GPUs, written once in Triton and used by the backends of several vendors.

A library of those, not a plug-in: it registers nothing. ``kt_triton.backend`` can be imported
without Triton, the rest cannot.
"""
