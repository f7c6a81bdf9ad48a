"""Threat models and attacks. Pixels lie in [0, 1]; normalisation is inside the model."""

from .objectives import OBJECTIVES, margin
from .pgd import PGD
from .threat import L2, Linf, Threat, threat

__all__ = ["L2", "OBJECTIVES", "PGD", "Linf", "Threat", "margin", "threat"]
