"""The compilers of GPUs and TPUs, on a machine that has none: they tell exactly how much memory a program needs.

Import this before JAX begins: it sets what the compilers want to know.  Packages, in an environment of its own:

    pip install "jax==X" "jax-cuda12-pjrt==X" "jax-cuda12-plugin==X" nvidia-cuda-nvcc-cu12     # rtx4090, h100
    pip install "jax[tpu]==X"                                                                  # v5e:2x2, v6e:2x2, …
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # no device is looked for
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import contextlib

import jax
from jax.experimental import topologies

_GPU = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {per_core} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
  l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
  device_description_str: "{name}" runtime_version {{ major: 12 minor: 9 patch: 0 }}"""
GPUS = {
    "h100": _GPU.format(
        name="NVIDIA H100 80GB HBM3",
        **{"per_core": 233472, "threads": 2048, "cores": 132, "bandwidth": 3352320000000},
        **{"l2": 52428800, "clock": 1.98, "memory": 84978434048, "optin": 232448},
        **{"major": 9, "minor": 0},
    ),
    "rtx4090": _GPU.format(
        name="NVIDIA GeForce RTX 4090",
        **{"per_core": 102400, "threads": 1536, "cores": 128, "bandwidth": 1008000000000},
        **{"l2": 75497472, "clock": 2.52, "memory": 25393692672, "optin": 101376},
        **{"major": 8, "minor": 9},
    ),
}


class Missing(Exception):
    """The packages of a target are not there; the text says which they are."""


def placement(target: str) -> jax.sharding.Sharding:
    """Of everything on one device: `cpu`, a key of `GPUS`, or a TPU topology."""
    return jax.sharding.SingleDeviceSharding(device(target))


def device(target: str):
    if target == "cpu":
        return jax.local_devices(backend="cpu")[0]
    packages = "jax-cuda12-plugin and nvidia-cuda-nvcc-cu12" if target in GPUS else "libtpu"
    try:
        if target not in GPUS:
            return topologies.get_topology_desc(topology_name=target, platform="tpu").devices[0]
        from jax_plugins import xla_cuda12

        with contextlib.suppress(Exception):  # it is registered already
            xla_cuda12.initialize()
        return topologies.get_topology_desc(
            topology_name="1x1x1",
            platform="cuda",
            target_config=GPUS[target],
            topology="1x1x1",
        ).devices[0]
    except Exception as error:
        known = ", ".join(["cpu", *GPUS])
        raise Missing(
            f"--target {target} is skipped: its compiler does not start ({error}). It needs the packages {packages}; "
            f"targets are {known}, and TPU topologies such as v5e:2x2."
        ) from error
