"""Sparse attention from export to session: calibration, the cache's parts, budgets, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import ek
from kernel_cases import needs_library
from tiny import tiny_folder

from edgekit.bundle import DecoderSpec, LayerCache
from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.errors import ModelError, UserError
from edgekit.export.export import export
from edgekit.export.sparse import SparseOptions, calibrate
from edgekit.export.targets import find_target, host_target
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.report import Report
from edgekit.runtime.session import Session
from edgekit.weight import Dense

OPTIONS = SparseOptions(budget=48, recent=8, sinks=2, dense_layers=1, wide_layers=0, dense_below=64)


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen3ForCausalLM"])
def bundle(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    source = tiny_folder(folder / "source", architecture=request.param, layers=3)
    compress(open_model(str(source)), load_recipe("int4"), folder / "small")
    export(
        open_checkpoint(folder / "small"),
        folder / "bundle",
        target=find_target(host_target()),
        context=1024,
        rope_scaling=("yarn", 8.0),
        sparse=OPTIONS,
        accept_drift=True,
    )
    return folder / "bundle"


@needs_library
def test_a_sparse_bundle_answers_and_says_what_it_is(bundle: Path) -> None:
    session = Session.open(bundle)
    assert [layer.sparse for layer in session.bundle.spec.layers] == [
        False,
        *[True] * (len(session.bundle.spec.layers) - 1),
    ]
    assert session.engine.budget == 48
    assert session.generate("The quick", max_tokens=5).text() is not None
    report = {row.name: row for row in Report.load(bundle / "report.json").measurements}
    assert "not trained for it" in report["context, times the trained one"].note


@needs_library
def test_a_budget_of_the_context_is_exact_and_a_small_one_is_near(bundle: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 300, 400).tolist()
    engine = Session.open(bundle).engine
    for start in range(0, 399, 50):  # up to 64 tokens at a time, activations are rounded alike
        engine.forward(ids[start : min(start + 50, 399)])
    found = {}
    for budget in (1 << 20, 399, 48, 4):
        engine.budget = budget
        engine.rewind(399)
        found[budget] = engine.forward(ids[-1:])[-1].copy()
    exact = found[1 << 20]
    assert np.array_equal(exact, found[399]) is False  # 400 positions, one of them left to its estimate
    spread = exact.std()
    assert np.abs(found[399] - exact).max() < 0.02 * spread
    assert 0 < np.abs(found[48] - exact).max() < np.abs(found[4] - exact).max() + spread
    engine.rewind(350)
    assert np.allclose(engine.forward(ids[350:])[-1], exact, atol=1e-3 * spread)  # several tokens attend exactly


@needs_library
@pytest.mark.parametrize(("wide_layers", "wide_budget", "same"), [(3, 400, True), (3, 300, False), (2, 400, False)])
def test_the_first_layers_have_a_budget_of_their_own(
    bundle: Path, tmp_path: Path, wide_layers: int, wide_budget: int, same: bool
) -> None:
    """With 400 positions for each of three layers, a small budget changes nothing."""
    options = replace(OPTIONS, dense_layers=0, wide_layers=wide_layers, wide_budget=wide_budget)
    checkpoint, target = open_checkpoint(bundle.parent / "small"), find_target(host_target())
    export(
        checkpoint,
        tmp_path / "wide",
        target=target,
        context=1024,
        sparse=options,
        accept_drift=True,
        rope_scaling=("yarn", 8.0),
    )
    ids = np.random.default_rng(0).integers(3, 300, 400).tolist()
    engine = Session.open(tmp_path / "wide").engine
    engine.forward(ids[:-1])
    found = []
    for budget in (48, 1 << 30):
        engine.budget = budget
        engine.rewind(399)
        found.append(engine.forward(ids[-1:])[-1].copy())
    assert np.array_equal(*found) is same


@needs_library
@pytest.mark.parametrize("start", [63, 64, 66, 79, 80])
def test_what_exact_tokens_left_serves_estimates_later(bundle: Path, start: int) -> None:
    """Tokens one by one, of which all but the last are exact, against the same prompt read at once."""
    ids = np.random.default_rng(2).integers(3, 300, 90).tolist()
    steps, whole = Session.open(bundle).engine, Session.open(bundle).engine
    steps.forward(ids[:50])
    steps.budget = 1000
    for at in range(50, start):
        steps.forward([ids[at]])
    steps.budget = 48
    stepped = steps.forward([ids[start]])[-1].copy()
    for part in (ids[:50], ids[50:start]):  # up to 64 tokens at a time, activations are rounded alike
        whole.forward(part)
    assert np.allclose(whole.forward([ids[start]])[-1], stepped, atol=5e-3 * stepped.std())


@needs_library
def test_codes_are_those_of_the_tokens_in_the_cache_after_a_rewind(bundle: Path) -> None:
    rng = np.random.default_rng(1)
    first, second = rng.integers(3, 300, (2, 300)).tolist()
    used, fresh = Session.open(bundle).engine, Session.open(bundle).engine
    used.forward(first)
    used.rewind(37)
    used.forward(second[37:])
    fresh.forward([*first[:37], *second[37:]])
    for name in ("1.codes", "1.means"):
        a, b = used.kept(300)[name], fresh.kept(300)[name]
        assert (a != b).mean() < 0.02, "but for rounding, which depends on how a prompt was cut"


@needs_library
@pytest.mark.parametrize(
    "options",
    [
        SparseOptions.as_published(budget=48, dense_below=64),
        SparseOptions(budget=48, dense_below=64, wide_layers=0, per_query_head=True),
        SparseOptions(budget=48, dense_below=64, prefill_budget=64, wide_layers=0),
    ],
    ids=["adamas", "per query head", "sparse prefill"],
)
def test_other_forms_run_and_are_exact_with_the_whole_budget(
    bundle: Path, tmp_path: Path, options: SparseOptions
) -> None:
    checkpoint = open_checkpoint(bundle.parent / "small")
    scaling = ("yarn", 8.0)
    made = {"dense": None, "sparse": options}
    for name, sparse in made.items():
        export(
            checkpoint,
            tmp_path / name,
            target=find_target(host_target()),
            context=1024,
            rope_scaling=scaling,
            sparse=sparse,
            accept_drift=True,
        )
    engines = {name: Session.open(tmp_path / name, threads=1).engine for name in made}
    ids = np.random.default_rng(2).integers(3, 300, 500).tolist()
    for engine in engines.values():
        engine.forward(ids[:499])
    engines["sparse"].budget = 1 << 20
    exact, same = (engine.forward(ids[-1:])[-1].copy() for engine in engines.values())
    if options.prefill_budget:
        assert 0 < np.abs(same - exact).max() < exact.std()
    else:
        assert np.array_equal(same, exact)
    engines["sparse"].budget = 48
    engines["sparse"].rewind(499)
    assert 0 < np.abs(engines["sparse"].forward(ids[-1:])[-1] - exact).max() < 3 * exact.std()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prefill", "sparse"], "--prefill sparse is for --attention sparse"),
        (["--attention", "adamas", "--prefill", "sparse"], "--prefill sparse is for --attention sparse"),
        (["--budget", "9"], "are for --attention sparse"),
        (["--target", "portable", "--cache", "int8"], "--cache int8 needs our operators"),
        (["--target", "npu-qnn", "--cache", "int8"], "are not for an NPU"),
    ],
)
def test_the_command_line_says_what_does_not_go_together(tmp_path: Path, words: list[str], message: str) -> None:
    done = ek("export", tiny_folder(tmp_path / "source", layers=1), "-o", tmp_path / "out", *words)
    assert done.status == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()


@needs_library
@pytest.mark.parametrize("budget", [0, -1, 1 << 31])
def test_a_budget_out_of_range_is_refused(bundle: Path, budget: int) -> None:
    with pytest.raises(UserError, match="budget must be at least 1"):
        Session.open(bundle, budget=budget)


@needs_library
def test_sparse_attention_needs_our_operators(bundle: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(bundle.parent / "small")
    with pytest.raises(UserError, match="sparse attention needs our operators"):
        export(checkpoint, tmp_path / "out", target=find_target("portable"), sparse=OPTIONS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="at least 256 tokens: this one has"):
        export(checkpoint, tmp_path / "out", target=find_target(host_target()), sparse=OPTIONS, calibration="The fox")


@pytest.mark.parametrize(
    "options",
    [{"budget": 0}, {"recent": 0}, {"sinks": -1}, {"dense_below": -1}, {"followers": -1}, {"prefill_budget": -1}],
)
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="of sparse attention must be from"):
        SparseOptions(**options)


def test_adamas_has_no_followers() -> None:
    with pytest.raises(UserError, match="followers must be 0 with adamas"):
        SparseOptions(adamas=True)


def test_a_spec_must_have_a_budget_with_its_sparse_layers_alone() -> None:
    sizes = {"architecture": "a", "target": "x86", "vocabulary": 9, "context_length": 9, "eos_ids": ()}
    more = {"resident_bytes": 1, "activation_bytes": 1}
    for layers, budget in (((LayerCache(1, 16, sparse=True),), None), ((LayerCache(1, 16),), 8)):
        with pytest.raises(ModelError, match="must come with sparse layers"):
            DecoderSpec(**sizes, **more, layers=layers, budget=budget)  # type: ignore[arg-type]
    spec = DecoderSpec(**sizes, **more, layers=(LayerCache(3, 64, sparse=True),), budget=8, operators="edgekit")  # type: ignore[arg-type]
    assert spec.cache_bytes(256) == 256 * 3 * (64 * 2 * 2 + 64 // 4) + 3 * 16 * (64 + 2)


def test_keys_that_are_alike_are_refused(tmp_path: Path) -> None:
    checkpoint = open_model(str(tiny_folder(tmp_path / "source", layers=1)))
    with pytest.raises(ModelError, match="keys must be numbers that differ"):
        calibrate(_Stuck(checkpoint), list(range(3, 300)) * 2, context=4096)


class _Stuck:
    """A checkpoint whose keys do not depend on the token."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)

    def weight(self, module: str) -> Any:
        weight = self.checkpoint.weight(module)
        return Dense(np.zeros(weight.shape, np.float32)) if module.endswith("k_proj") else weight
