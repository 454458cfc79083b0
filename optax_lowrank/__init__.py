"""Low-rank gradient optimizers: `update = unfold(scale · P inner(PᵀG) + residual(G − P PᵀG))`."""

from optax_lowrank import adapters as adapters
from optax_lowrank.accumulate import accumulated as accumulated
from optax_lowrank.adarankgrad import adarankgrad as adarankgrad
from optax_lowrank.assemble import INJECT_STATIC_ARGS as INJECT_STATIC_ARGS, assemble as assemble
from optax_lowrank.bases import InCodes as InCodes, InDtype as InDtype
from optax_lowrank.fira import (
    fira as fira,
    limit_norm_growth as limit_norm_growth,
    scale_by_subspace_ratio as scale_by_subspace_ratio,
)
from optax_lowrank.fits import (
    adaptive_rank as adaptive_rank,
    gaussian as gaussian,
    randomized_svd as randomized_svd,
    subspace_iteration as subspace_iteration,
    svd as svd,
)
from optax_lowrank.galore import galore as galore
from optax_lowrank.gradnormlorp import gradnormlorp as gradnormlorp, weight_norm as weight_norm
from optax_lowrank.layerwise import (
    LayerwiseStep as LayerwiseStep,
    layerwise_step as layerwise_step,
)
from optax_lowrank.low_rank import LowRankState as LowRankState, low_rank as low_rank
from optax_lowrank.moments import rotated as rotated, scale_by_rotated_adam as scale_by_rotated_adam
from optax_lowrank.natural_galore import (
    natural_galore as natural_galore,
    scale_by_woodbury_fisher as scale_by_woodbury_fisher,
)
from optax_lowrank.quantize import quantize_state as quantize_state
from optax_lowrank.refresh import (
    every as every,
    in_windows as in_windows,
    on_convergence as on_convergence,
    on_staleness as on_staleness,
)
from optax_lowrank.report import diagnostics as diagnostics, memory_report as memory_report
from optax_lowrank.resize import (
    abstract_state as abstract_state,
    compact as compact,
    resize as resize,
)
from optax_lowrank.sharding import state_shardings as state_shardings
from optax_lowrank.views import (
    MatrixAxes as MatrixAxes,
    describe as describe,
    matrix_axes as matrix_axes,
)

__version__ = "0.1.0"
