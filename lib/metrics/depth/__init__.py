"""How a Transformer uses its depth: contributions, skips, lens, gradients, scores and maps between models."""

from lib.metrics.depth.contributions import (
    Contributions,
    Cosines,
    contributions_and_cosines,
    random_walk_ratio,
    relative_contributions,
    sublayer_cosines,
)
from lib.metrics.depth.erasure import (
    Erasure,
    OrderEffects,
    layer_swaps,
    mean_residual,
    order_effects,
    residual_erasure,
)
from lib.metrics.depth.gradients import Attribution, integrated_gradients
from lib.metrics.depth.lens import EarlyExit, Lens, early_exit, logit_lens
from lib.metrics.depth.pooled import PerPrompt
from lib.metrics.depth.scores import (
    EffectiveDepth,
    depth_score,
    depth_score_interval,
    effective_depth,
    effective_depth_interval,
    effective_depths,
)
from lib.metrics.depth.skips import SkipEffects, current_and_future, future_places, skip_effects
from lib.metrics.depth.stitching import Diagonal, Stitching, stitching

__all__ = [
    "Attribution",
    "Contributions",
    "Cosines",
    "Diagonal",
    "EarlyExit",
    "EffectiveDepth",
    "Erasure",
    "Lens",
    "OrderEffects",
    "PerPrompt",
    "SkipEffects",
    "Stitching",
    "contributions_and_cosines",
    "current_and_future",
    "depth_score",
    "depth_score_interval",
    "early_exit",
    "effective_depth",
    "effective_depth_interval",
    "effective_depths",
    "future_places",
    "integrated_gradients",
    "layer_swaps",
    "logit_lens",
    "mean_residual",
    "order_effects",
    "random_walk_ratio",
    "relative_contributions",
    "residual_erasure",
    "skip_effects",
    "stitching",
    "sublayer_cosines",
]
