"""Plain ONNX files, made smaller by onnxruntime's own quantiser.

    dynamic   weights in int8, activations rounded at run time            no data; for transformers
    static    weights and activations in int8, scales from calibration    QDQ nodes; for convolutions and NPUs

The result is a folder with model.onnx and a manifest, to be opened by any onnxruntime. Both models are run on the
calibration data, or on random inputs where there is none, and what differs is recorded: random inputs show a graph that
broke, not what the model's task loses.

Source: onnxruntime.quantization. We choose per-channel scales where it takes one a tensor by default. Not supported:
models over 2 GB, inputs that are no tensors, and weights that are quantised already.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.bundle import MODEL
from edgekit.errors import ModelError, UserError
from edgekit.folder import digest, inside, new_folder
from edgekit.manifest import Manifest, SourceRecord, StepRecord, now, record_files, versions
from edgekit.report import Measurement

Feed = dict[str, NDArray[Any]]
LARGEST = 2_000_000_000  # bytes: what one protobuf file can hold
SAMPLES = 8  # random inputs, where there are no others
DYNAMIC_SIZE = 8  # of an input's free dimension but the first, in random inputs
STEP = {"dynamic": "onnx.dynamic_int8", "static": "onnx.static_int8"}
QUANTISED = ("DynamicQuantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "MatMulNBits")


@dataclass(frozen=True)
class Calibration:
    """Samples of each input: arrays (samples, ...) by the input's name, all with as many samples."""

    samples: Mapping[str, NDArray[Any]]
    sha256: str = ""

    @property
    def count(self) -> int:
        return min((len(values) for values in self.samples.values()), default=0)

    def feeds(self) -> Iterator[Feed]:
        """One sample after the other, each a batch of one."""
        for index in range(self.count):
            yield {name: values[index : index + 1] for name, values in self.samples.items()}


def load_calibration(path: Path) -> Calibration:
    """Read an .npz file. Raises UserError: unreadable, with pickled objects, empty, or of unequal sample counts."""
    try:
        with np.load(path, allow_pickle=False) as file:
            samples = {name: np.asarray(file[name]) for name in file.files}
    except Exception as problem:  # zip, header and format errors have no common base
        raise UserError(f"calibration must be an .npz file of plain arrays: {path} ({problem})") from problem
    if not samples or any(values.ndim == 0 for values in samples.values()):
        raise UserError(f"calibration must hold an array (samples, ...) for each input: {path} does not")
    counts = {name: len(values) for name, values in samples.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise UserError(f"calibration must hold as many samples of each input, and one or more: {path} has {counts}")
    return Calibration(samples, digest(path))


def quantize_file(
    source: Path, output: Path, *, calibration: Calibration | None = None, force: bool = False
) -> Manifest:
    """Write `source`, quantised to 8 bits, to the folder `output`: static with `calibration`, dynamic without.

    Raises UserError: no such file, or calibration that does not fit the model's inputs. ModelError: no ONNX model, one
    that onnxruntime cannot run or quantise, nothing in it to quantise, or outputs that are no longer finite.
    """
    model = load_plain(source)
    before = _size_bytes(source, model)
    if before > LARGEST:
        raise UserError(
            f"an ONNX file must be below {LARGEST / 1e9:.0f} GB to be quantised: {source} has {before} bytes"
        )
    kind: Literal["dynamic", "static"] = "static" if calibration else "dynamic"
    feeds = feeds_for(source, calibration)
    with new_folder(output, force=force) as folder:
        clock = time.perf_counter()
        changed = _quantize(source, folder / MODEL, calibration)
        seconds = time.perf_counter() - clock
        after = (folder / MODEL).stat().st_size
        measured = compare(source, folder / MODEL, feeds, note=f"{'calibration' if calibration else 'random'} inputs")
        facts: dict[str, float] = {"samples": float(calibration.count)} if calibration else {}
        options: dict[str, object] = {"calibration_sha256": calibration.sha256} if calibration else {}
        manifest = Manifest(
            kind="onnx",
            source=SourceRecord(source.name, "onnx", digest(source)),
            files=record_files(folder, [path.name for path in folder.iterdir()]),
            recipe="int8",
            steps=(StepRecord(STEP[kind], options, changed, before, after, facts, seconds=seconds),),
            measurements=(Measurement("size of the file", after / 1e6, "MB"), *measured),
            versions=versions("numpy", "onnx", "onnxruntime"),
            created=now(),
        )
        manifest.save(folder)
    return manifest


def load_plain(source: Path) -> onnx.ModelProto:
    """The checked model without its external data. Raises UserError: no such file; ModelError: no whole model, weights
    outside its folder, or quantised already."""
    if not source.is_file():
        raise UserError(f"an ONNX model must be a file: there is no {source}")
    try:
        model = onnx.load(str(source), load_external_data=False)
        _refuse_escapes(source, model)
        onnx.checker.check_model(str(source))
    except ModelError:
        raise
    except Exception as problem:  # protobuf and the checker raise classes of their own
        raise ModelError(f"{source} must be a whole ONNX model: {_first_line(problem)}") from problem
    if any(node.op_type in QUANTISED for node in model.graph.node):
        raise ModelError(f"an ONNX file must hold plain floats: {source} is quantised already; take the original")
    return model


def _refuse_escapes(source: Path, model: onnx.ModelProto) -> None:
    """Raise ModelError for weights that lie outside the model's own folder."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                inside(source.parent, entry.value)


def _size_bytes(source: Path, model: onnx.ModelProto) -> int:
    """The file and the files of weights beside it."""
    places: set[str] = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    return sum(path.stat().st_size for path in (source, *(source.parent / place for place in places)))


def _quantize(source: Path, target: Path, calibration: Calibration | None) -> int:
    """Write the quantised model; how many nodes of it work in integers."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, feeds: Iterator[Feed]) -> None:
            self._feeds = feeds

        def get_next(self) -> Feed | None:
            return next(self._feeds, None)

    unknown_types = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # behind operators that inference does not know
    with tempfile.TemporaryDirectory(dir=target.parent) as work, _quiet():
        ready = _inferred(source, Path(work) / "inferred.onnx")
        try:
            if calibration is None:
                quantize_dynamic(
                    ready, target, per_channel=True, weight_type=QuantType.QInt8, extra_options=unknown_types
                )
            else:
                quantize_static(
                    ready,
                    target,
                    Reader(calibration.feeds()),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    extra_options=unknown_types,
                )
        except Exception as problem:  # it raises plain exceptions of many kinds
            raise ModelError(f"onnxruntime could not quantise {source}: {_first_line(problem)}") from problem
    target.chmod(0o644)
    made = [node.op_type for node in onnx.load(str(target), load_external_data=False).graph.node]
    changed = sum(op in ("MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM", "DequantizeLinear") for op in made)
    if not changed:
        raise ModelError(
            f"an ONNX file must have something to quantise: {source} has no product with a constant weight"
        )
    return changed


def _inferred(source: Path, target: Path) -> Path:
    """The model with its weights inside and its shapes inferred, which the quantiser wants."""
    model = onnx.load(str(source))
    with contextlib.suppress(Exception):  # inference is a help and no need; what it cannot do stays unknown
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    onnx.save(model, str(target))
    return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's advice off the terminal: it logs to the root logger."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- what changed -----------------------------------------------------------------------------------------------------


def compare(source: Path, quantised: Path, feeds: Sequence[Feed], *, note: str) -> tuple[Measurement, ...]:
    """The outputs of both models over `feeds`: relative difference and lowest cosine over all float outputs.

    Raises ModelError when the quantised model does not run, or gives what is not finite where the original's is.
    """
    before, after = _session(source), _session(quantised)
    error = power = 0.0
    lowest = 1.0
    for feed in feeds:
        pairs = zip(_run(before, feed, source), _run(after, feed, quantised), strict=True)
        for expected, got in pairs:
            if expected.dtype.kind != "f" or not expected.size:
                continue
            a, b = expected.astype(np.float64).ravel(), got.astype(np.float64).ravel()
            if np.isfinite(a).all() and not np.isfinite(b).all():
                raise ModelError(f"outputs must stay finite: the quantised {source.name} gives NaN or infinity")
            error, power = error + float(np.square(a - b).sum()), power + float(np.square(a).sum())
            lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
            lowest = min(lowest, float(a @ b) / lengths if lengths else 1.0)
    relative = float(np.sqrt(error / power)) if power else 0.0
    return (
        Measurement("outputs: relative difference", relative, "", n=len(feeds), note=note),
        Measurement("outputs: lowest cosine", lowest, "", n=len(feeds), note=note),
    )


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as problem:
        raise ModelError(f"onnxruntime {ort.__version__} cannot run {path}: {_first_line(problem)}") from problem


def _run(session: ort.InferenceSession, feed: Feed, path: Path) -> list[NDArray[Any]]:
    try:
        return [np.asarray(values) for values in session.run(None, feed)]
    except Exception as problem:
        raise ModelError(f"{path} must run on its inputs: {_first_line(problem)}; pass --calibration") from problem


_KINDS: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def feeds_for(source: Path, calibration: Calibration | None) -> list[Feed]:
    """Inputs for a model: the samples of `calibration`, or random ones. Raises UserError: samples that do not fit."""
    return _checked(calibration, source) if calibration else _random_feeds(source)


def _checked(calibration: Calibration, source: Path) -> list[Feed]:
    """The samples as feeds. Raises UserError where names, types or ranks are not those of the model's inputs."""
    wanted = {value.name: value for value in _session(source).get_inputs()}
    if set(calibration.samples) != set(wanted):
        raise UserError(
            f"calibration must hold an array for each input of {source.name}: it has"
            f" {', '.join(sorted(calibration.samples))}, the model takes {', '.join(sorted(wanted))}"
        )
    for name, values in calibration.samples.items():
        kind, shape = _KINDS.get(wanted[name].type), wanted[name].shape
        fixed = [(a, b) for a, b in zip(values.shape[1:], shape[1:], strict=False) if isinstance(b, int) and a != b]
        if kind is None or values.dtype != kind or values.ndim != len(shape) or fixed:
            raise UserError(
                f"calibration must fit the model's inputs: {name} is {values.dtype} {values.shape},"
                f" {source.name} takes {wanted[name].type} {shape}"
            )
    return list(calibration.feeds())


def _random_feeds(source: Path) -> list[Feed]:
    """Normal numbers for floats, zeros and ones for integers: safe as token ids and as masks."""
    rng = np.random.default_rng(0)
    feeds = []
    inputs = _session(source).get_inputs()
    for _ in range(SAMPLES):
        feed: Feed = {}
        for value in inputs:
            kind = _KINDS.get(value.type)
            if kind is None:
                raise ModelError(f"inputs must be tensors of known types: {value.name} is {value.type}")
            shape = [d if isinstance(d, int) else 1 if i == 0 else DYNAMIC_SIZE for i, d in enumerate(value.shape)]
            floats = np.issubdtype(kind, np.floating)
            feed[value.name] = (rng.standard_normal(shape) if floats else rng.integers(0, 2, shape)).astype(kind)
        feeds.append(feed)
    return feeds


def _first_line(problem: Exception) -> str:
    text = str(problem).strip().splitlines()
    return text[0][:300] if text else type(problem).__name__
