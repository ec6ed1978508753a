"""The linears of a decoder layer as they run, and what each reads: see `edgekit.model.torch_view`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

Stage = Literal["attention_input", "mixed", "mlp_input", "gated"]
STAGES: dict[Stage, tuple[str, ...]] = {  # what reads each stage, by the module's place in its layer
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixed": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "gated": ("mlp.down_proj",),
}
LINEARS = tuple(leaf for leaves in STAGES.values() for leaf in leaves)
assert tuple(STAGES) == get_args(Stage)


def stage_of(module: str) -> Stage | None:
    """The stage that a module of a decoder layer reads; None for what is no linear of one."""
    return next((stage for stage, leaves in STAGES.items() if module.endswith(leaves)), None)


def in_order(modules: Iterable[str]) -> list[str]:
    """Modules of one block as they run; what is no linear of a layer keeps its place at the end."""

    def place(module: str) -> int:
        return next((at for at, leaf in enumerate(LINEARS) if module.endswith(leaf)), len(LINEARS))

    return sorted(modules, key=place)
