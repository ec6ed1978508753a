"""Convolutions of a plain ONNX file as three smaller ones, by Tucker decomposition of their kernels.

    conv K: (out, in, h, w)  ~  conv 1 x 1 (in -> r_in), conv h x w (r_in -> r_out), conv 1 x 1 (r_out -> out)

Strides, pads and dilations stay with the middle one, the bias goes to the last. Ranks are the smallest whose HOSVD
keeps |K - K'| <= error |K| (`edgekit.tn.tucker`), then refined for these ranks; a kernel whose three parts would not
multiply less stays as it is, as do groups, 1 x 1 kernels and kernels that are no constants, with the reason in the
record. Zero pads stay exact: the first convolution has no bias, so a padded zero is a zero behind it.
Both models are run (`edgekit.export.onnx_model.compare`) and what differs is recorded; there is no training here.
Source: Kim et al., arXiv 1511.06530, whose ranks come from a Bayesian rule instead. Not supported: files over 2 GB.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgekit.bundle import MODEL
from edgekit.errors import ModelError, UserError
from edgekit.export.onnx_model import Calibration, Feed, compare, feeds_for, load_plain
from edgekit.folder import digest, new_folder
from edgekit.manifest import Manifest, Skip, SourceRecord, StepRecord, now, record_files, versions
from edgekit.report import Measurement
from edgekit.tn.tucker import Tucker, ranks_for_error, tucker

ERROR = 0.1  # of a kernel, where the command line asks for none


def decompose_file(
    source: Path, output: Path, *, error: float = ERROR, calibration: Calibration | None = None, force: bool = False
) -> Manifest:
    """Write `source` with its convolutions decomposed to the folder `output`. `error`: see the module.

    Raises UserError: no such file, an error that is not from 0 to 1, calibration that does not fit. ModelError: no
    ONNX model, one that onnxruntime cannot run, or nothing in it to decompose.
    """
    if not 0 <= error < 1:
        raise UserError(f"error must be from 0 to below 1: got {error}")
    load_plain(source)
    model = onnx.load(str(source))
    before = model.ByteSize()
    feeds: list[Feed] = feeds_for(source, calibration)
    clock = time.perf_counter()
    changed, skipped, lost = _decompose(model, error)
    seconds = time.perf_counter() - clock
    if not changed:
        raise ModelError(
            f"an ONNX file must have convolutions that get smaller: {source} has none at error {error}"
            + "".join(f"; {skip.path}: {skip.reason}" for skip in skipped[:3])
        )
    with new_folder(output, force=force) as folder:
        onnx.save(model, str(folder / MODEL))
        after = (folder / MODEL).stat().st_size
        measured = compare(source, folder / MODEL, feeds, note=f"{'calibration' if calibration else 'random'} inputs")
        manifest = Manifest(
            kind="onnx",
            source=SourceRecord(source.name, "onnx", digest(source)),
            files=record_files(folder, [MODEL]),
            recipe="tucker",
            steps=(
                StepRecord(
                    "onnx.tucker",
                    {"error": error},
                    changed,
                    before,
                    after,
                    {"worst_relative_error": lost},
                    tuple(skipped),
                    seconds=seconds,
                ),
            ),
            measurements=(Measurement("size of the file", after / 1e6, "MB"), *measured),
            versions=versions("numpy", "onnx", "onnxruntime"),
            created=now(),
        )
        manifest.save(folder)
    return manifest


def _decompose(model: onnx.ModelProto, error: float) -> tuple[int, list[Skip], float]:
    """Change the graph in place: convolutions changed, those left alone, the worst relative error of a kernel."""
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    nodes: list[onnx.NodeProto] = []
    skipped: list[Skip] = []
    changed, worst = 0, 0.0
    for index, node in enumerate(graph.node):
        if node.op_type != "Conv":
            nodes.append(node)
            continue
        name = node.name or f"Conv_{index}"
        found = _cut(node, held, error)
        if isinstance(found, str):
            skipped.append(Skip(name, found))
            nodes.append(node)
            continue
        cut, lost = found
        nodes += _three(node, f"{name}_{index}", cut, graph)
        readers[node.input[1]] -= 1
        if not readers[node.input[1]]:
            graph.initializer.remove(held[node.input[1]])
        changed, worst = changed + 1, max(worst, lost)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed, skipped, worst


def _cut(node: onnx.NodeProto, held: dict[str, onnx.TensorProto], error: float) -> tuple[Tucker, float] | str:
    """The kernel's decomposition and its relative error, or why there is none."""
    if node.input[1] not in held or held[node.input[1]].data_type != onnx.TensorProto.FLOAT:
        return "its kernel is no constant of float32"
    if next((a.i for a in node.attribute if a.name == "group"), 1) != 1:
        return "it works on groups of channels"
    K = numpy_helper.to_array(held[node.input[1]])
    taps = math.prod(K.shape[2:])
    if K.ndim < 3 or taps == 1:
        return "its kernel is 1 x 1, which is a matrix"
    size = float(np.linalg.norm(K))
    if not 0 < size < math.inf:
        return "its kernel is zero or not finite"
    r_out, r_in = ranks_for_error(K, 2, error)
    out, ins = K.shape[:2]
    if out * r_out + taps * r_out * r_in + r_in * ins >= K.size:
        return f"at ranks {r_out} and {r_in} of {out} and {ins} its parts would not be smaller"
    found = tucker(K, (r_out, r_in), where=node.input[1])
    return found, float(np.linalg.norm(found.dense() - K)) / size


def _three(node: onnx.NodeProto, name: str, cut: Tucker, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The three convolutions in the place of `node`; their kernels are added to the graph."""
    flat = (1,) * (cut.core.ndim - 2)
    kernels = {
        "in": cut.factors[1].T.reshape(*cut.factors[1].T.shape, *flat),
        "core": cut.core,
        "out": cut.factors[0].reshape(*cut.factors[0].shape, *flat),
    }
    for part, K in kernels.items():
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(K, np.float32), f"{name}_{part}"))
    middle = helper.make_node("Conv", [f"{name}_x", f"{name}_core"], [f"{name}_y"], name=f"{name}_core")
    middle.attribute.extend(node.attribute)
    last = [f"{name}_y", f"{name}_out", *node.input[2:]]
    return [
        helper.make_node("Conv", [node.input[0], f"{name}_in"], [f"{name}_x"], name=f"{name}_in"),
        middle,
        helper.make_node("Conv", last, list(node.output), name=f"{name}_out"),
    ]
