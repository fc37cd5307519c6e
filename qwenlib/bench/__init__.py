"""Ours against another library in one process: same weights, dtype, threads and tokens.

Every rate is in tokens a second and every ratio is ours over theirs: above 1, ours is faster.
"""

from qwenlib.bench.runner import BenchError, Report, run, select
from qwenlib.bench.timing import Comparison, compare

__all__ = ["BenchError", "Comparison", "Report", "compare", "run", "select"]
