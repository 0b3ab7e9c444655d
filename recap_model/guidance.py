"""Classifier-free guidance (pi*0.6 appendix E): v = v_u + beta (v_c - v_u). beta = 1 is the conditional velocity."""

from typing import Any


def combine(conditional: Any, unconditional: Any, beta: Any) -> Any:
    """Works on numpy arrays and torch tensors alike; beta broadcasts."""
    return unconditional + beta * (conditional - unconditional)
