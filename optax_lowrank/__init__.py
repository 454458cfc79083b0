"""Low-rank gradient optimizers: `update = unfold(α P A + G diag(c))`."""

from optax_lowrank import adapters
from optax_lowrank.assemble import assemble
from optax_lowrank.bases import InCodes, InDtype, dct, seeded
from optax_lowrank.classify import describe, matrix_axes
from optax_lowrank.fits import adaptive_rank, gaussian, randomized_svd, subspace_iteration, svd
from optax_lowrank.layerwise import LayerwiseStep, apply_rounded, layerwise_step
from optax_lowrank.limit import limit_norm_growth
from optax_lowrank.low_rank import Geometry, LowRankState, low_rank
from optax_lowrank.methods.adarankgrad import adarankgrad
from optax_lowrank.methods.apollo import apollo
from optax_lowrank.methods.fira import fira
from optax_lowrank.methods.galore import galore
from optax_lowrank.methods.gradnormlorp import gradnormlorp, weight_norm
from optax_lowrank.methods.low_rank_muon import low_rank_muon, orthogonalize
from optax_lowrank.methods.natural_galore import natural_galore, scale_by_woodbury_fisher
from optax_lowrank.moments import rotated, scale_by_rotated_adam
from optax_lowrank.options import Options, inject_hyperparams
from optax_lowrank.plan import Plan, PlanRow, plan
from optax_lowrank.quantize import quantize_state
from optax_lowrank.refresh import every, in_windows, on_convergence, on_staleness
from optax_lowrank.report import diagnostics, memory_report
from optax_lowrank.resize import abstract_state, compact, resize
from optax_lowrank.rules import Rule, Turn, accumulated, chained
from optax_lowrank.sharding import state_shardings
from optax_lowrank.views import MatrixAxes

__all__ = [
    "Geometry", "InCodes", "InDtype", "LayerwiseStep", "LowRankState", "MatrixAxes", "Options", "Plan", "PlanRow",
    "Rule", "Turn", "abstract_state", "accumulated", "adapters", "adaptive_rank", "adarankgrad", "apollo",
    "apply_rounded", "assemble", "chained", "compact", "dct", "describe", "diagnostics", "every", "fira", "galore",
    "gaussian", "gradnormlorp", "in_windows", "inject_hyperparams", "layerwise_step", "limit_norm_growth",
    "low_rank", "low_rank_muon", "matrix_axes", "memory_report", "natural_galore", "on_convergence", "on_staleness",
    "orthogonalize", "plan", "quantize_state", "randomized_svd", "resize", "rotated", "scale_by_rotated_adam",
    "scale_by_woodbury_fisher", "seeded", "state_shardings", "subspace_iteration", "svd", "weight_norm",
]  # fmt: skip
__version__ = "0.2.0.dev0"
