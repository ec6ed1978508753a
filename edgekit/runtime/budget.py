"""Memory, predicted before anything is loaded.

The prediction is the peak of resident memory: the interpreter with its libraries, the weights as onnxruntime holds
them, keys and values of the whole context, and the activations of one prefill chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.bundle import DecoderSpec
from edgekit.errors import BudgetError
from edgekit.profile.memory import available_bytes

PREFILL_CHUNK = 512  # tokens a run: bounds the activations' memory without costing speed
BASE_BYTES = 85_000_000  # Python, NumPy, tokenizers and onnxruntime with a session: measured, docs/log.md


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes by kind, beside what the machine has left."""

    weights_bytes: int
    cache_bytes: int
    activation_bytes: int
    available_bytes: int | None
    context: int
    largest_context: int

    @property
    def total_bytes(self) -> int:
        return BASE_BYTES + self.weights_bytes + self.cache_bytes + self.activation_bytes

    def refuse_if_too_large(self) -> None:
        """Raise BudgetError, with the numbers and what would fit, when the prediction is over what is available."""
        if self.available_bytes is None or self.total_bytes <= self.available_bytes:
            return
        fits = f"pass --context {self.largest_context}" if self.largest_context > 0 else "use a smaller model"
        raise BudgetError(
            f"the model must fit in memory: it needs {_mb(self.total_bytes)} (weights {_mb(self.weights_bytes)}, cache"
            f" of {self.context} tokens {_mb(self.cache_bytes)}, activations {_mb(self.activation_bytes)}, runtime"
            f" {_mb(BASE_BYTES)}), {_mb(self.available_bytes)} are available; {fits}"
        )


def plan_memory(spec: DecoderSpec, *, context: int) -> MemoryPlan:
    """Predict the memory of a session over `context` tokens on this machine."""
    available = available_bytes()
    activations = spec.activation_bytes * min(PREFILL_CHUNK, context) + spec.vocabulary * 4
    left = 0 if available is None else available - BASE_BYTES - spec.resident_bytes - activations
    return MemoryPlan(
        weights_bytes=spec.resident_bytes,
        cache_bytes=spec.cache_bytes(context),
        activation_bytes=activations,
        available_bytes=available,
        context=context,
        largest_context=max(0, left // spec.token_bytes) // 64 * 64,
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
