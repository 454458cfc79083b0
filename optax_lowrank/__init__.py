"""Low-rank gradient optimizers: `update = unfold(α P A + G diag(c))`."""

from optax_lowrank import adapters as adapters
from optax_lowrank.assemble import assemble as assemble
from optax_lowrank.bases import (
    InCodes as InCodes,
    InDtype as InDtype,
    dct as dct,
    seeded as seeded,
)
from optax_lowrank.classify import describe as describe, matrix_axes as matrix_axes
from optax_lowrank.fits import (
    adaptive_rank as adaptive_rank,
    gaussian as gaussian,
    randomized_svd as randomized_svd,
    subspace_iteration as subspace_iteration,
    svd as svd,
)
from optax_lowrank.layerwise import (
    LayerwiseStep as LayerwiseStep,
    apply_rounded as apply_rounded,
    layerwise_step as layerwise_step,
)
from optax_lowrank.limit import limit_norm_growth as limit_norm_growth
from optax_lowrank.low_rank import (
    Geometry as Geometry,
    LowRankState as LowRankState,
    low_rank as low_rank,
)
from optax_lowrank.methods.adarankgrad import adarankgrad as adarankgrad
from optax_lowrank.methods.apollo import apollo as apollo
from optax_lowrank.methods.fira import fira as fira
from optax_lowrank.methods.galore import galore as galore
from optax_lowrank.methods.gradnormlorp import (
    gradnormlorp as gradnormlorp,
    weight_norm as weight_norm,
)
from optax_lowrank.methods.low_rank_muon import (
    low_rank_muon as low_rank_muon,
    orthogonalize as orthogonalize,
)
from optax_lowrank.methods.natural_galore import (
    natural_galore as natural_galore,
    scale_by_woodbury_fisher as scale_by_woodbury_fisher,
)
from optax_lowrank.moments import rotated as rotated, scale_by_rotated_adam as scale_by_rotated_adam
from optax_lowrank.options import Options as Options, inject_hyperparams as inject_hyperparams
from optax_lowrank.plan import Plan as Plan, PlanRow as PlanRow, plan as plan
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
from optax_lowrank.rules import (
    Rule as Rule,
    Turn as Turn,
    accumulated as accumulated,
    chained as chained,
)
from optax_lowrank.sharding import state_shardings as state_shardings
from optax_lowrank.views import MatrixAxes as MatrixAxes

__version__ = "0.2.0.dev0"
