"""The PyTorch peers: a process that steps `galore-torch`, `fira` and `apollo-torch` when it is told to.

`benchmarks.processes.Peers` starts it with a Python that has them and talks to it in lines of JSON. The first says what
to prepare and is answered by a checksum of the last gradient; every other one is a call, answered by its seconds:

    {"threads": 2, "rank": 128, "gradients": "normal", "shapes": [[512, 1376]], "optimizers": ["fira"]}  ->  checksum
    ["step", "fira"]  ->  seconds
"""

import json
import sys
import time
import unittest.mock
import warnings

import numpy as np
import torch

from benchmarks.gradients import KINDS

NEVER = 10**9  # update_proj_gap of the steps between refreshes


def optimizers():
    """Class, its options and those of projected weights, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bitsandbytes, which two of them import
        from apollo_torch import APOLLOAdamW
        from fira import FiraAdamW
        from galore_torch import GaLoreAdamW
    silent, std = {"no_deprecation_warning": True}, {"proj_type": "std"}
    apollo = {"scale": 1.0, "proj": "random", "scale_type": "channel", **std}
    return {
        "AdamW": (torch.optim.AdamW, {}, {}),
        "galore-torch": (GaLoreAdamW, silent, {"scale": 0.25, **std}),
        "fira": (FiraAdamW, silent, {"alpha": 0.25, **std}),
        "apollo-torch": (APOLLOAdamW, silent, apollo),
    }


class Peer:
    """One optimizer with weights of its own; the gradients are everybody's."""

    def __init__(self, factory, options, projected, grads, rank):
        self.weights = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = grad
        if projected:
            projected = {"rank": rank, "update_proj_gap": NEVER, **projected}
        self.optimizer = factory([{"params": self.weights, **projected}], lr=1e-3, **options)

    def step(self):
        self.optimizer.step()

    def refresh(self):
        """A step in which every matrix gets a new basis."""
        self.set_gap(1)
        self.optimizer.step()
        self.set_gap(NEVER)

    def start(self):
        """A first step with random bases, for shapes whose SVD takes minutes."""
        with unittest.mock.patch.object(torch.linalg, "svd", random_factors):
            self.optimizer.step()

    def set_gap(self, gap):
        for group in self.optimizer.param_groups:
            if "rank" in group:
                group["update_proj_gap"] = gap  # of projectors to come
        for state in self.optimizer.state.values():
            if "projector" in state:
                state["projector"].update_proj_gap = gap


def random_factors(matrix, full_matrices):
    (m, n), k = matrix.shape, min(matrix.shape)
    return torch.randn(m, k) / m**0.5, torch.ones(k), torch.randn(k, n) / n**0.5


def prepare(job):
    """The calls that a job allows, by name, and the checksum of its last gradient."""
    torch.set_num_threads(job["threads"])
    grads = []
    for matrix in KINDS[job["gradients"]](job["shapes"]):
        checksum = float(np.abs(matrix).sum())
        grads.append(torch.from_numpy(np.ascontiguousarray(matrix.T)))  # (out, in)
    known = optimizers() if job["optimizers"] else {}
    peers = {name: Peer(*known[name], grads, job["rank"]) for name in job["optimizers"]}
    calls = {
        "step": lambda name: peers[name].step(),
        "refresh": lambda name: peers[name].refresh(),
        "start": lambda name: peers[name].start(),
        "svd": lambda index: torch.linalg.svd(grads[index], full_matrices=False),
    }
    return calls, checksum


def main():
    answers, sys.stdout = sys.stdout, sys.stderr  # some print when they are imported
    calls, checksum = prepare(json.loads(sys.stdin.readline()))
    print(checksum, file=answers, flush=True)
    for line in sys.stdin:
        call, argument = json.loads(line)
        start = time.perf_counter()
        calls[call](argument)
        print(time.perf_counter() - start, file=answers, flush=True)


if __name__ == "__main__":
    main()
