"""Bind each trainer to the CPUs near its GPU; needs neither numactl nor CUDA."""

from aiockpt.elastic.numa.compute import compute_bindings
from aiockpt.elastic.numa.options import AffinityMode, NumaOptions

__all__ = ["AffinityMode", "NumaOptions", "compute_bindings"]
