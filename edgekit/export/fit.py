"""Do the weights fit each other? Asked of their shapes, before the first file is written."""

from __future__ import annotations

from edgekit.bundle import LayerCache
from edgekit.checkpoint import Checkpoint
from edgekit.errors import ModelError
from edgekit.model.heads import PAIRS, Heads, heads_of_layer, refuse_thin_heads

_MATRICES = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_LEAVES = [*_MATRICES, *(f"{module}.bias" for module in _MATRICES), *(f"{norm}.weight" for norm in _NORMS), PAIRS]
HEAD_STEP = 16  # channels: onnxruntime turns heads of a multiple of them


def layer_caches(checkpoint: Checkpoint) -> tuple[LayerCache, ...]:
    """The cache of each layer, as its own weights shape it.

    Raises ModelError: weights that are missing or do not fit each other, or heads that onnxruntime cannot turn.
    """
    return tuple(LayerCache(kv_heads=heads.keys, head_dim=heads.key_size) for heads in layer_heads(checkpoint))


def layer_heads(checkpoint: Checkpoint) -> tuple[Heads, ...]:
    """The heads of each layer. Raises as `layer_caches` does."""
    config = checkpoint.decoder
    for module in ("model.embed_tokens",) if config.tied else ("model.embed_tokens", "lm_head"):
        _expect(module, checkpoint.shape(module), (config.vocabulary, config.hidden_size))
    _expect_norms(checkpoint, ["model.norm"], config.hidden_size)
    found = tuple(_layer_heads(checkpoint, f"model.layers.{index}") for index in range(config.layers))
    _expect_nothing_else(checkpoint)
    return found


def usual_caches(checkpoint: Checkpoint, what: str) -> tuple[LayerCache, ...]:
    """`layer_caches` for `what`, which needs heads of one size. Raises UserError for others."""
    caches = layer_caches(checkpoint)
    refuse_thin_heads(checkpoint, what)
    return caches


def _layer_heads(checkpoint: Checkpoint, layer: str) -> Heads:
    hidden = checkpoint.decoder.hidden_size
    heads = heads_of_layer(checkpoint, int(layer.rpartition(".")[2]))
    if heads.key_size % HEAD_STEP:
        raise ModelError(
            f"head_dim must be a multiple of {HEAD_STEP} to be exported: that of {layer} is {heads.key_size}"
        )
    if heads.value_size > heads.key_size:
        raise ModelError(
            f"values must not have more channels than keys to be exported: {layer} has {heads.value_size} and"
            f" {heads.key_size}; use prune.values too"
        )
    queries, keys, values = heads.queries * heads.key_size, heads.keys * heads.key_size, heads.keys * heads.value_size
    mlp = checkpoint.shape(f"{layer}.mlp.gate_proj")[0]
    wanted = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (values, hidden),
        "self_attn.o_proj": (hidden, heads.queries * heads.value_size),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    for module, shape in wanted.items():
        _expect(f"{layer}.{module}", checkpoint.shape(f"{layer}.{module}"), shape)
    _expect_norms(checkpoint, [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"], hidden)
    norms = [f"{layer}.self_attn.{name}_norm" for name in "qk"]
    _expect_norms(checkpoint, [name for name in norms if checkpoint.has(name)], heads.key_size)
    return heads


def _expect_nothing_else(checkpoint: Checkpoint) -> None:
    """A weight that the graph would not read means that the model computes something else."""
    known = {"model.embed_tokens", "model.norm.weight", *(() if checkpoint.decoder.tied else ("lm_head",))}
    for index in range(checkpoint.decoder.layers):
        known |= {f"model.layers.{index}.{leaf}" for leaf in _LEAVES}
    for matrices, vectors in checkpoint.blocks.values():
        for name in (*matrices, *vectors):
            tied_head = name == "lm_head" and checkpoint.decoder.tied  # some files hold the table twice
            if name not in known and not tied_head and not name.endswith(".rotary_emb.inv_freq"):
                raise ModelError(
                    f"every weight must have a place in the graph: {name} has none in {checkpoint.decoder.architecture}"
                    f" with {checkpoint.decoder.layers} layers"
                )


def _expect_norms(checkpoint: Checkpoint, modules: list[str], size: int) -> None:
    for module in modules:
        _expect(module, checkpoint.vector(f"{module}.weight").shape, (size,))


def _expect(module: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ModelError(f"the weights must fit each other: {module} has shape {shape}, the model needs {wanted}")
