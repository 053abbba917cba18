"""Measuring kernels: what ``kt bench`` prints, and what scripts in ``bench/`` compare."""
