"""Bundles for NPUs: graphs of fixed shapes against the NumPy forward, the engine that feeds them, who runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from command_line import ek, ok
from tiny import tiny_folder

from edgekit.bundle import Bundle, StaticGraphs
from edgekit.checkpoint import Checkpoint
from edgekit.device import load_device
from edgekit.errors import ContextOverflow, DeviceError, ModelError, UserError
from edgekit.export import npu
from edgekit.export.npu import rounding_for
from edgekit.export.npu_export import export_npu
from edgekit.export.parity import agreement
from edgekit.export.rounded import Rounding
from edgekit.export.targets import TARGETS
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.runtime import providers
from edgekit.runtime.providers import Choice, choose
from edgekit.runtime.session import Session
from edgekit.runtime.static import StaticEngine, inputs

CPU = Choice("onnxruntime CPU")
IDS = np.random.default_rng(0).integers(3, 384, 40).tolist()
FAMILIES = {
    "llama": {},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "tied": False},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "head_dim": 32},
    "one head": {"heads": 2, "kv_heads": 2, "layers": 1},
}


def opened(path: Path, **facts: object) -> Checkpoint:
    return open_model(str(tiny_folder(path, **facts)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model for both targets, 48 tokens of context."""
    home = tmp_path_factory.mktemp("npu")
    checkpoint = opened(home / "tiny")
    for name in ("npu-qnn", "npu-openvino"):
        export_npu(checkpoint, home / name, target=TARGETS[name], context=48)
    return {"model": home / "tiny", "npu-qnn": home / "npu-qnn", "npu-openvino": home / "npu-openvino"}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("target", ["npu-qnn", "npu-openvino"])
def test_the_graphs_choose_the_tokens_that_the_forward_chooses(name: str, target: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "tiny", **FAMILIES[name])
    export_npu(checkpoint, tmp_path / "out", target=TARGETS[target], context=48, accept_drift=True)
    bundle = Bundle.open(tmp_path / "out")
    engine = StaticEngine(bundle.path, bundle.spec, threads=1, choice=CPU)
    expected = forward(checkpoint, [IDS])[0]
    got = engine.forward(IDS, keep=len(IDS))
    assert agreement(expected, got).mean() >= 0.95
    assert np.abs(expected - got).max() < 0.1 * np.abs(expected).max()


def test_channels_that_stick_out_are_divided_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bar low, most channels get a divisor: what comes out is the same up to rounding."""
    checkpoint = opened(tmp_path / "tiny")
    export_npu(checkpoint, tmp_path / "plain", target=TARGETS["npu-qnn"], context=48)
    monkeypatch.setattr(npu, "USUAL", 0.3)
    monkeypatch.setattr(npu, "STICKS_OUT", 0.1)
    export_npu(checkpoint, tmp_path / "divided", target=TARGETS["npu-qnn"], context=48)
    logits = []
    for name in ("plain", "divided"):
        bundle = Bundle.open(tmp_path / name)
        logits.append(StaticEngine(bundle.path, bundle.spec, threads=1, choice=CPU).forward(IDS, keep=len(IDS)))
    assert np.abs(logits[0] - logits[1]).max() < 0.02 * np.abs(logits[0]).max()


def test_a_channel_of_large_values_gets_a_divisor_and_others_none() -> None:
    names = Rounding(observed=["embed", "model.layers.0.self_attn.scores"], stream=["embed"], norms={"n": "embed"})
    low, high = np.array([[-1.0], [-2.0]], np.float32), np.array([[2000.0], [3.0]], np.float32)
    channels = np.array([[1.0, 1.0, 2000.0, 1.0]], np.float32)
    found = rounding_for(names, (low, high, -channels, channels), 1)
    assert found.divisors is not None
    assert found.divisors.tolist() == [1, 1, 512, 1]
    assert found.ranges is not None
    assert found.ranges["embed"][1] == pytest.approx(npu.ROOM * 2000 / 512)
    assert found.ranges["n.whole"][1] == pytest.approx(npu.ROOM * 2000)
    assert found.hidden > npu.ROOM * 5  # hides behind every score


@pytest.mark.parametrize("target", ["npu-qnn", "npu-openvino"])
def test_pieces_of_any_length_give_the_same_logits(target: str, bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles[target])
    engine = StaticEngine(bundle.path, bundle.spec, threads=1, choice=CPU)
    whole = engine.forward(IDS[:20], keep=20).copy()
    engine.rewind(0)
    parts = [engine.forward(IDS[start:end], keep=end - start) for start, end in ((0, 1), (1, 8), (8, 9), (9, 20))]
    scale = np.abs(whole).max()
    assert np.abs(np.concatenate(parts) - whole).max() < (1e-4 if target == "npu-openvino" else 0.02) * scale
    engine.rewind(5)
    again = engine.forward(IDS[5:20], keep=3)
    assert np.abs(again - whole[-3:]).max() < 0.02 * scale


def test_the_engine_keeps_to_its_context(bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles["npu-openvino"])
    engine = StaticEngine(bundle.path, bundle.spec, threads=1, choice=CPU)
    assert engine.forward((IDS + IDS)[:48]).shape == (1, bundle.spec.vocabulary)
    with pytest.raises(ContextOverflow):
        engine.forward([3])
    with pytest.raises(UserError, match="token ids must be from 0"):
        engine.forward([bundle.spec.vocabulary])
    assert len(engine.tokens) == 48


def test_the_mask_shows_the_past_and_what_came_before() -> None:
    mask = inputs([5, 6], 3, length=3, context=4, hidden=9.0)["mask"][0, 0]
    assert (mask == 0).tolist() == [
        [True, True, True, False, True, False, False],
        [True, True, True, False, True, True, False],
        [True, True, True, False, True, True, True],
    ]


def test_a_session_says_where_it_runs(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package there is a reason, in the report and on the terminal, and the answer all the same."""
    monkeypatch.setattr(providers, "plugin_devices", missing)
    session = Session.open(bundles["npu-openvino"], threads=1)
    assert session.engine.kernels == "onnxruntime CPU (openvino needs its package)"
    assert session.generate("The quick", max_tokens=3).text() is not None
    done = ok("run", bundles["npu-openvino"], "The quick", "--max-tokens", "2", "--threads", "1")
    assert "[runs on onnxruntime CPU: openvino needs its package]" in done.err
    with pytest.raises(DeviceError, match="openvino needs its package"):
        Session.open(bundles["npu-openvino"], threads=1, processor="npu")


def missing(name: str) -> tuple[object, ...]:
    raise DeviceError(f"{name} needs its package")


@pytest.mark.parametrize("name", ["qnn", "openvino"])
def test_the_package_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        providers, "PROVIDERS", {name: providers.Provider("the-package", "no_such_module", "V", "an NPU")}
    )
    providers.plugin_devices.cache_clear()
    with pytest.raises(DeviceError, match=f"{name} needs the package the-package: pip install 'edgekit\\[npu\\]'"):
        choose(name, "npu")
    assert "the-package" in choose(name).reason
    providers.plugin_devices.cache_clear()


def test_a_processor_that_is_none_of_the_three_is_refused() -> None:
    with pytest.raises(UserError, match="must be auto, npu or cpu: got 'gpu'"):
        choose("qnn", "gpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--target", "npu-qnn", "--device", "pi5"], "needs an NPU: Raspberry Pi 5"),
        (["--target", "npu-qnn", "--device", "lunar-lake"], "--target npu-openvino"),
        (["--target", "npu-openvino", "--device", "orange-pi5"], "for which there is no target"),
        (["--target", "npu-qnm"], "did you mean 'npu-qnn'?"),
        (["--target", "npu-qnn", "--attention", "sparse"], "are not for an NPU"),
        (["--target", "npu-openvino", "--context", "1"], "--context must be from 2"),
        (["--target", "npu-openvino", "--wheelhouse"], "--wheelhouse is for Arm devices"),
    ],
)
def test_what_an_npu_cannot_be_asked_for(words: list[str], rule: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    done = ek("export", bundles["model"], "-o", tmp_path / "out", *words)
    assert done.status == 2
    assert rule in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


def test_a_broken_spec_is_refused() -> None:
    with pytest.raises(ModelError, match="chunk and hidden must be above zero"):
        StaticGraphs("qnn", 0, 1.0, "uint16")


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_qnn") is None, reason="needs onnxruntime-qnn")
def test_a_graph_compiled_for_a_hexagon_gives_the_same_tokens(bundles: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_model(str(bundles["model"]))
    device = load_device("snapdragon-8-elite")
    export_npu(checkpoint, tmp_path / "out", target=TARGETS["npu-qnn"], device=device, context=48)
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.spec.static is not None
    assert bundle.spec.static.compiled == "Hexagon v79"
    expected = StaticEngine(bundle.path, bundle.spec, threads=1, choice=CPU).forward(IDS, keep=len(IDS))
    engine = Session.open(tmp_path / "out", threads=1, processor="npu").engine
    assert agreement(expected, engine.forward(IDS, keep=len(IDS))).mean() >= 0.95


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_ep_openvino") is None, reason="needs openvino")
def test_openvino_gives_the_same_logits_on_its_cpu(bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles["npu-openvino"])
    expected = StaticEngine(bundle.path, bundle.spec, threads=1, choice=CPU).forward(IDS, keep=len(IDS))
    session = Session.open(bundles["npu-openvino"], threads=1, processor="cpu")
    if "OpenVINO offers no CPU device" in session.engine.kernels:
        pytest.skip("OpenVINO offers no CPU device on this processor")
    assert session.engine.kernels == "openvino CPU"
    got = session.engine.forward(IDS, keep=len(IDS))
    assert np.abs(expected - got).max() < 1e-4 * np.abs(expected).max()
