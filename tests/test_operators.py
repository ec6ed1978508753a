import json
from pathlib import Path

import pytest
from test_reference import tiny_checkpoint

from edgekit.bundle import Bundle
from edgekit.errors import DeviceError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.profile.operators import (
    ModelRun,
    NodeTime,
    Trace,
    chrome_trace,
    kernel_share,
    layer_table,
    operator_table,
    read_trace,
    top_nodes,
    trace_bundle,
)


def event(name: str, ts: int, dur: int, op: str = "MatMul", **args: str) -> dict[str, object]:
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": ts,
        "dur": dur,
        "ph": "X",
        "args": {"op_name": op, **args},
    }


def model_run(ts: int, dur: int) -> dict[str, object]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "ph": "X", "args": {}}


EVENTS = [
    {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 50, "args": {}},
    event("before", 40, 5),
    event("model.layers.0.mlp", 110, 30, mem_arena_held="4096"),
    event("model.layers.1.mlp", 150, 40, mem_arena_held="8192"),
    model_run(100, 100),
    event("model.layers.0.mlp", 310, 10),
    event("model.layers.1.mlp", 320, 20, "Add"),
    model_run(300, 40),
    event("model.layers.0.mlp", 410, 12),
    event("model.layers.1.mlp", 425, 30, "Add"),
    model_run(400, 60),
]


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    (tmp_path / "trace.json").write_text(json.dumps(EVENTS))
    return read_trace(tmp_path / "trace.json")


def test_nodes_are_sorted_into_their_runs(trace: Trace) -> None:
    assert [(run.duration_us, run.node_us, len(run.nodes)) for run in trace.runs] == [
        (100, 70, 2),
        (40, 30, 2),
        (60, 42, 2),
    ]
    assert trace.arena_bytes == 8192
    assert kernel_share(trace, prefills=1) == pytest.approx(72 / 100)


def test_tables_fold_prefill_and_the_median_token(trace: Trace) -> None:
    layers = {row.label: row.values for row in layer_table(trace, prefills=1).rows}
    assert layers["layer 0"] == (1.0, 0.03, pytest.approx(0.011), pytest.approx(100 * 11 / 36))
    assert layers["layer 1"] == (1.0, 0.04, pytest.approx(0.025), pytest.approx(100 * 25 / 36))
    operators = operator_table(trace, prefills=1)
    assert [row.label for row in operators.rows] == ["Add", "MatMul"], "the slowest first"
    assert [row.label for row in top_nodes(trace, prefills=1, count=1).rows] == ["model.layers.1.mlp"]


def test_the_trace_for_perfetto_nests(trace: Trace) -> None:
    events = [e for e in json.loads(chrome_trace(trace, prefills=1))["traceEvents"] if e["ph"] == "X"]
    runs = [e for e in events if e["tid"] == 1]
    assert [e["name"] for e in runs] == ["prefill", "decode", "decode"]
    for inner in (e for e in events if e["tid"] > 1):
        assert any(r["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= r["ts"] + r["dur"] for r in runs)
    assert [e["name"] for e in events if e["tid"] == 2][:2] == ["layer 0", "layer 1"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"name": "model_run"}]', "[" * 10**5, '[{"name": "model_run", "ts": "x"}]']
)
def test_a_file_that_is_no_trace(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DeviceError, match=r"profile could not be read.*--no-operators"):
        read_trace(tmp_path / "t.json")


def test_a_trace_without_runs_gives_empty_tables() -> None:
    nothing = Trace((), None)
    assert operator_table(nothing, prefills=0).rows == ()
    assert kernel_share(nothing, prefills=0) is None
    one = Trace((ModelRun(0, 5, (NodeTime("a", "Add", 0, 3),)),), None)
    assert operator_table(one, prefills=1).rows[0].values == (1.0, 0.003, 0.0, 0.0)


@pytest.mark.parametrize(("context", "prompt", "decoded"), [(256, 64, 24), (32, 16, 24), (16, 16, 11)])
def test_a_bundle_is_traced_with_its_own_names(context: int, prompt: int, decoded: int, tmp_path: Path) -> None:
    export(tiny_checkpoint(), tmp_path / "tiny", target=TARGETS["portable"])
    bundle = Bundle.open(tmp_path / "tiny")
    found, prefills = trace_bundle(bundle, context=context, threads=1, prompt_tokens=prompt)
    assert prefills == 1
    assert len(found.runs) - prefills == decoded
    layers = [row.label for row in layer_table(found, prefills=prefills).rows]
    assert {"layer 0", "layer 1"} <= set(layers)
    assert not list(tmp_path.glob("*trace*"))
