"""The Plan as a Python value. (The planner itself is C++: ``tvm_infer.plan``; ``reference`` is the same in plain Python.)"""

from ..band import Band
from .plan import Plan

__all__ = ["Band", "Plan"]
