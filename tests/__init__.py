"""Tests of optax_lowrank, and the flags of XLA that make them quick."""

from importlib.metadata import version

# Compiling tiny programs is most of the suite's time, and of the notebooks': unoptimized machine code takes half of it,
# and XLA's older code generator a third of that. Later ones have no other, and end the process at flags that they do
# not know.
QUICK_COMPILATION = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")):
    QUICK_COMPILATION += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
