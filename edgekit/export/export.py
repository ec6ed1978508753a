"""Export: a checkpoint becomes a bundle for a target, checked against the NumPy forward before it is published."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from edgekit.bundle import MODEL, SPEC, WEIGHTS, DecoderSpec
from edgekit.checkpoint import Checkpoint, refuse_overlap
from edgekit.device import Device, load_device
from edgekit.errors import ModelError, UserError
from edgekit.export.coarse import coarse_layers, coarse_row, fall_back, most_sensitive
from edgekit.export.contract import contracted
from edgekit.export.decoder import build_decoder
from edgekit.export.native import build_native_decoder, runs_natively
from edgekit.export.parity import (
    BOUNDS,
    PROMPTS,
    Bounds,
    DriftError,
    check_parity,
    divergence,
)
from edgekit.export.record import write_manifest
from edgekit.export.sparse import TOKENS, WRITTEN, KeyCode, SparseOptions, calibrate, written_text
from edgekit.export.starter import add_starter
from edgekit.export.stock import stock_bits
from edgekit.export.targets import ActivationBits, Target
from edgekit.folder import new_folder
from edgekit.host import host_device
from edgekit.kernels.library import library_path, status
from edgekit.kernels.opset import CacheType
from edgekit.kernels.pack import LANES
from edgekit.manifest import Manifest
from edgekit.model.config import stretched
from edgekit.model.reference import Kept, forward
from edgekit.report import Measurement
from edgekit.runtime.engine import Engine
from edgekit.runtime.fit import fit as predict
from edgekit.runtime.fit import spec_footprint
from edgekit.runtime.static import Decoder
from edgekit.runtime.text import whole

PACKING = 1.2  # onnxruntime's packed copy of quantised weights holds block sums beside codes and scales (docs/log.md)
LONGEST = 32768  # tokens of rotary tables, unless asked for more
CONTRACTED_KL = 0.05  # nats: what rounding the products of factors once more may cost unasked
CHECKED = 64  # tokens of each prompt that are compared with the NumPy forward


def export(
    checkpoint: Checkpoint,
    output: Path,
    *,
    target: Target,
    device: Device | None = None,
    context: int | None = None,
    rope_scaling: tuple[str, float] | None = None,
    sparse: SparseOptions | None = None,
    cache: CacheType = "float16",
    activations: ActivationBits = 15,
    factors: Literal["auto", "keep"] = "auto",
    calibration: str | None = None,
    wheelhouse: bool = False,
    force: bool = False,
    accept_drift: bool = False,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Write a bundle to `output`; `on_progress` is told each stage.

    `rope_scaling`, a kind and a factor, makes the context longer than the trained one, and the report says so.
    A factored matrix whose factors would be slower than the matrix on the device is multiplied out (see `contract`),
    unless `factors` are to be kept.
    With `sparse`, tokens attend to a part of a long context; `calibration` is the text that its codes are fitted to, by
    default one that the model writes itself. `cache` is what keys and values are kept in, where the target has our
    operators; stock graphs keep float32. `activations` are the bits that our operators round activations to when
    they decode: 8 take fewer instructions, 15 agree with the checkpoint, "mixed" is 8 where that moves the model least
    (docs/kernels.md).

    Raises UserError for a bad request, ModelError when the graph does not agree with the checkpoint (`accept_drift`
    lets it pass and records the numbers); nothing is left at `output` then.
    """
    if rope_scaling is not None:
        checkpoint = replace(checkpoint, config=stretched(checkpoint.config, *rope_scaling))
    config = checkpoint.decoder
    if "tokenizer.json" not in checkpoint.assets:
        raise UserError(
            f"a bundle needs tokenizer.json: {checkpoint.source.name} has none; save a fast tokenizer with it"
        )
    longest = min(config.context_length, LONGEST) if context is None else context
    if not 0 < longest <= config.context_length:
        raise UserError(f"--context must be from 1 to the model's {config.context_length}: got {context}")
    refuse_overlap(checkpoint, output)
    ours = target.native and library_path() is not None
    decided: tuple[Measurement, ...] = ()
    if factors == "auto":
        machine = device or (load_device(target.device) if target.device else None)
        whole_matrices, decided = contracted(checkpoint, machine, native=ours)
        if whole_matrices is not checkpoint:
            on_progress("measuring what is multiplied out")
            decided = (*decided, _moved(checkpoint, whole_matrices, accept_drift=accept_drift))
            checkpoint = whole_matrices
    with new_folder(output, force=force) as folder:
        on_progress("building the graph")
        native = ours and runs_natively(checkpoint)
        if activations != 15 and not native:
            raise UserError(
                f"--activations {activations} is for our operators: the model must be quantised, the target native"
                f" ({target.name}) and the kernels installed ({status()})"
            )
        coarse: frozenset[int] = frozenset()
        if activations == "mixed":
            on_progress("finding layers for activations of 8 bits")
            coarse = coarse_layers(checkpoint, _sequences(open_tokenizer(checkpoint), min(CHECKED, longest)))
        if sparse is not None and not native:
            raise UserError(
                f"sparse attention needs our operators: the model must be quantised, the target native ({target.name})"
                f" and the kernels installed ({status()})"
            )
        if cache != "float16" and not native:
            raise UserError(
                f"--cache {cache} needs our operators: the model must be quantised, the target native ({target.name})"
                f" and the kernels installed ({status()})"
            )
        if cache == "int4":
            if sparse is not None:
                raise UserError("a cache in 4 bits is for dense attention: sparse attention takes float16 or int8")
            if config.head_dim % (2 * LANES):
                raise UserError(
                    f"a cache in 4 bits needs heads of a multiple of {2 * LANES} channels: the model's have"
                    f" {config.head_dim}; pass --cache int8"
                )
        if sparse is not None:
            if config.sliding_window:
                raise UserError("sparse attention needs attention to the whole context: the model has a sliding window")
            if sparse.adamas and config.head_dim & (config.head_dim - 1):
                raise UserError(f"adamas needs heads of a power of two channels: the model's have {config.head_dim}")
            on_progress("calibrating sparse attention")
            keys = _key_codes(checkpoint, folder, longest, calibration, adamas=sparse.adamas)
            layers = build_native_decoder(
                checkpoint,
                folder,
                context=longest,
                sparse=sparse,
                keys=keys,
                cache=cache,
                coarse_layers=coarse,
            )
        elif native:
            layers = build_native_decoder(checkpoint, folder, context=longest, cache=cache, coarse_layers=coarse)
        else:
            layers = build_decoder(checkpoint, folder, context=longest, integer_bits=target.integer_bits)
        spec = DecoderSpec(
            architecture=config.architecture,
            target=target.name,
            vocabulary=config.vocabulary,
            context_length=longest,
            layers=layers,
            eos_ids=eos_ids(checkpoint),
            resident_bytes=(folder / WEIGHTS).stat().st_size + 4 * longest * config.head_dim  # the rotary tables
            if native
            else _packed_bytes(checkpoint),
            activation_bytes=activation_bytes(checkpoint),
            operators="edgekit" if native else "stock",
            budget=sparse.budget if sparse else None,
            decode_threads=device.decode_threads if device else None,
            cache="float" if cache == "float16" else cache,
            activations=8 if activations == 8 else 15,
        )
        (folder / SPEC).write_text(spec.to_json(), encoding="utf-8")
        for name, content in checkpoint.assets.items():
            (folder / name).write_bytes(content)
        on_progress("checking it against the NumPy forward")
        check = functools.partial(
            _check,
            checkpoint,
            folder,
            spec,
            products=_products(checkpoint, target, activations if native else None),
            accept_drift=accept_drift,
        )
        try:
            measured = check()
        except DriftError:
            if native or not target.integer_bits:
                raise
            on_progress("finding layers that need float32 activations")
            build = functools.partial(
                build_decoder, checkpoint, folder, context=longest, integer_bits=target.integer_bits
            )
            order = most_sensitive(
                checkpoint, _sequences(open_tokenizer(checkpoint), min(CHECKED, config.context_length))
            )
            measured = fall_back(order, build, check)
        if rope_scaling is not None:
            note = f"{rope_scaling[0]} rope scaling: the model was not trained for it"
            measured = (*measured, Measurement("context, times the trained one", rope_scaling[1], "x", note=note))
        measured = (*measured, *decided)
        if activations == "mixed":
            measured = (*measured, coarse_row(coarse, config.layers))
        if target.arch == "aarch64":
            on_progress("packing what starts it on the device")
            measured = (*measured, *_starter(folder, spec, device, wheelhouse=wheelhouse))
        on_progress("writing digests")
        return write_manifest(checkpoint, folder, measured)


def _starter(folder: Path, spec: DecoderSpec, device: Device | None, *, wheelhouse: bool) -> tuple[Measurement, ...]:
    """Add run.sh and wheels, and predict how the bundle fits on the device, which is planned for and not refused."""
    rows: list[Measurement] = []
    try:
        add_starter(folder, wheelhouse=wheelhouse)
    except UserError as problem:
        if wheelhouse:
            raise
        rows.append(Measurement("starter", None, "", note=f"no run.sh and no kernels inside: {problem}"))
    if device is not None:
        if device.threads is not None:
            decode = min(device.threads, spec.decode_threads or device.threads)
            note = f"of {device.title}, little cores left out; {decode} of them decode"
            rows.append(Measurement("plan: threads", float(device.threads), "", how="predicted", note=note))
        for size in sorted(device.ram_options_gb):
            plan = predict(spec_footprint(spec, folder), device, ram_gb=size)
            room = f"fits, up to {plan.largest_context} tokens" if plan.fits else plan.what_would_fit()
            note = f"{spec.context_length} tokens of context, {size:g} GB: {room}"
            rows.append(
                Measurement(f"plan: memory with {size:g} GB", plan.needed_bytes / 1e6, "MB", "predicted", note=note)
            )
    return tuple(rows)


def _key_codes(checkpoint: Checkpoint, folder: Path, context: int, text: str | None, *, adamas: bool) -> list[KeyCode]:
    """Calibrate on a text, or on one that the exact graph writes, which is built in `folder` and taken away again."""
    tokenizer = open_tokenizer(checkpoint)
    if text is not None:
        return calibrate(checkpoint, tokenizer.encode(text).ids[: min(context, TOKENS)], context=context, adamas=adamas)
    tokens = min(context, WRITTEN)
    layers = build_native_decoder(checkpoint, folder, context=tokens)
    config = checkpoint.decoder
    spec = DecoderSpec(
        architecture=config.architecture,
        target="calibration",
        vocabulary=config.vocabulary,
        context_length=tokens,
        layers=layers,
        eos_ids=(),
        resident_bytes=0,
        activation_bytes=0,
        operators="edgekit",
    )
    engine = Engine(folder / MODEL, spec, context=tokens, threads=host_device().threads or 1)
    ids = written_text(engine, tokenizer.encode(PROMPTS[0]).ids[:tokens], tokens=tokens)
    for name in (MODEL, WEIGHTS):
        (folder / name).unlink()
    return calibrate(checkpoint, ids, context=context, adamas=adamas)


def _check(
    checkpoint: Checkpoint, folder: Path, spec: DecoderSpec, *, products: str, accept_drift: bool
) -> tuple[Measurement, ...]:
    tokenizer = open_tokenizer(checkpoint)
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= spec.vocabulary:
        raise ModelError(f"token ids must be below the embedding's {spec.vocabulary} rows: the tokenizer has {highest}")
    context = min(spec.context_length, 2 * CHECKED)
    sequences = _sequences(tokenizer, min(CHECKED, context))
    engine = Engine(folder / MODEL, spec, context=context, threads=1)
    bounds = BOUNDS[products]
    if accept_drift:
        bounds = Bounds(kl=float("inf"), agreement=0.0)
    kept: Kept = "float16" if spec.cache == "float" else spec.cache
    parity = check_parity(checkpoint, engine, sequences, bounds=bounds, cache=kept)
    return (*parity, sentence(engine, tokenizer, sequences[0]))


def _moved(original: Checkpoint, contracted: Checkpoint, *, accept_drift: bool) -> Measurement:
    """How far the model with products in place of factors is from the one that it was made of. Raises DriftError."""
    sequences = _sequences(open_tokenizer(original), min(CHECKED, original.decoder.context_length))
    pairs = zip(forward(original, sequences), forward(contracted, sequences), strict=True)
    kl = float(np.concatenate([divergence(*pair) for pair in pairs]).mean())
    if kl > CONTRACTED_KL and not accept_drift:
        raise DriftError(
            "factors are slower than matrices here, and rounding their products to the same bits moves the model too"
            f" far: KL {kl:.2g} (bound {CONTRACTED_KL:g}); pass --factors keep for the slower model, --accept-drift"
            " for this one, or name the device in the recipe's tn.lowrank, which then leaves such matrices whole"
        )
    return Measurement("contracted products: mean KL to the factors", kl, "nat", n=sum(map(len, sequences)))


def _sequences(tokenizer: Tokenizer, most: int) -> list[list[int]]:
    """The prompts that are compared, of at most `most` tokens. Raises ModelError: the tokenizer makes none."""
    found = [ids[:most] for ids in (tokenizer.encode(prompt).ids for prompt in PROMPTS) if ids]
    if not found:
        raise ModelError("the tokenizer must make tokens of English text: tokenizer.json gives none; is it damaged?")
    return found


def _products(checkpoint: Checkpoint, target: Target, bits: ActivationBits | None) -> str:
    """What the graph multiplies in: a key of `BOUNDS`. `bits`: of activations in our operators, where they run."""
    if bits in (15, "mixed"):
        return "int15" if bits == 15 else "mixed"
    integers = any(
        entry.kind == "quantized" and stock_bits(entry.bits) in target.integer_bits
        for entry in checkpoint.structure.values()
    )
    return "int8" if integers else "float32"


def sentence(engine: Decoder, tokenizer: Tokenizer, prompt: list[int]) -> Measurement:
    """Generate 16 tokens greedily: a person reading the report sees at once whether the model still speaks."""
    ids = list(prompt[: max(1, engine.context - 16)])
    count = len(ids)
    logits = engine.forward(ids)
    while len(ids) < min(count + 16, engine.context):
        ids.append(int(logits[-1].argmax()))
        logits = engine.forward(ids[-1:])
    text = re.sub(r"\s+", " ", tokenizer.decode(ids[count:]))
    distinct = len(set(ids[count:])) / max(1, len(ids) - count)
    note = f'"{PROMPTS[0]}" goes on: {text.strip()}'
    return Measurement("sample: distinct tokens", distinct * 100, "%", n=len(ids) - count, note=note)


def eos_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """End tokens: generation_config.json decides where there is one, then config.json."""
    raw = checkpoint.assets.get("generation_config.json", b"{}")
    try:
        ids = json.loads(raw).get("eos_token_id")
    except (ValueError, AttributeError, RecursionError) as problem:
        raise ModelError(f"generation_config.json must hold a JSON object: {problem}") from problem
    if ids is None:
        return checkpoint.decoder.eos_ids
    found = tuple(ids) if isinstance(ids, list) else (ids,)
    if not all(type(token) is int for token in found):
        raise ModelError(f"generation_config.json: eos_token_id must be one or more token ids: got {ids!r}")
    return found


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    try:
        return whole(Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode()))
    except Exception as problem:  # the library raises plain Exception
        raise ModelError(f"tokenizer.json of {checkpoint.source.name} must be a tokenizer: {problem}") from problem


def _packed_bytes(checkpoint: Checkpoint) -> int:
    """What stock onnxruntime holds: a packed copy of each matrix, and a tied table mapped for look-ups beside it."""
    total = 0.0
    for matrices, vectors in checkpoint.blocks.values():
        for module in (part for matrix in matrices for part in checkpoint.parts(matrix)):
            rows, columns = checkpoint.shape(module)
            entry = checkpoint.structure.get(module)
            if entry is None:
                size = packed = 4.0 * rows * columns
            else:
                blocks = rows * -(-columns // entry.block)
                bits = stock_bits(entry.bits)
                offset = 4.0 if checkpoint.has(f"{module}.minima") else bits / 8
                size = blocks * (entry.block * bits / 8 + 4 + offset)  # codes, scale, zero point or offset
                packed = size * PACKING
            tied_table = module == "model.embed_tokens" and checkpoint.decoder.tied
            total += packed + size if tied_table else packed
        total += sum(4 * checkpoint.tensors.shape(name)[0] for name in vectors)
    return int(total)


def activation_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of one token's activations in the widest layer: the residual stream, q, k, v and the MLP."""
    widest = 0
    for index in range(checkpoint.decoder.layers):
        rows = [checkpoint.shape(f"model.layers.{index}.{m}")[0] for m in ("self_attn.q_proj", "mlp.gate_proj")]
        widest = max(widest, 4 * (4 * checkpoint.decoder.hidden_size + 3 * rows[0] + 3 * rows[1]))
    return widest
