"""All steering and sampling features, each in the module that computes it."""

from __future__ import annotations

from .feature import Feature
from .gains import GAINS
from .masks import MASKS
from .prev_contrast import PREV_CONTRAST
from .rewards import REWARDS
from .top_k_top_p import TRUNCATION
from .trust_region import KL_BUDGET

FEATURES: tuple[Feature, ...] = (REWARDS, GAINS, KL_BUDGET, PREV_CONTRAST, *MASKS, *TRUNCATION)
