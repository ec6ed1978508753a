"""What to measure: the one object that the command line, a remote host and Python code fill in alike.

`Options.from_json(options.to_json()) == options`, so that a run on another machine measures the same thing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from edgekit.errors import UserError
from edgekit.schema import parse

PROMPT_TOKENS = 512
GENERATE_TOKENS = 128
IDLE_WITH_SENSOR_S = 30.0
IDLE_S = 1.0


@dataclass(frozen=True)
class Options:
    """How a bundle is measured. None means: chosen for the bundle and the machine.

    prompt_tokens, generate_tokens: of one repetition; default 512 and 128, or what a small context has room for
    repetitions: counted ones, after one that is discarded
    context, threads: as `Session.open` takes them
    settle_s: seconds of rest before anything is measured
    idle_s: seconds of idle baseline before and after; default 30 with a power sensor, 1 without
    prompts: texts to be answered as well, in another order each repetition
    depths: for the context sweep, tokens in the cache before reading 16 and generating 16
    sweep_threads: thread counts to try, each with prefill and decode of its own
    cold: also time a load with the bundle's files out of memory, in a process of its own
    operators: time of each operator and layer (a run of its own, since taking these times costs time)
    power: "auto", "none", the name of a source (`edgekit.profile.power`), `csv:FILE` or `serial:DEVICE[@BAUD]`
    estimate_w: watts under load and at rest, told by the user: gives energy marked as estimated
    grid_g_per_kwh, price_per_kwh: give CO2 and cost
    seed: of the random prompts and their order

    Raises UserError: a number out of its range.
    """

    prompt_tokens: int | None = None
    generate_tokens: int | None = None
    repetitions: int = 5
    context: int | None = None
    threads: int | None = None
    settle_s: float = 1.0
    idle_s: float | None = None
    prompts: tuple[str, ...] = ()
    depths: tuple[int, ...] = ()
    sweep_threads: tuple[int, ...] = ()
    cold: bool = True
    operators: bool = True
    power: str = "auto"
    estimate_w: tuple[float, ...] = ()
    grid_g_per_kwh: float | None = None
    price_per_kwh: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"--prompt": self.prompt_tokens, "--generate": self.generate_tokens, "--repeat": self.repetitions}
        for option, count in counts.items():
            if count is not None and count < 1:
                raise UserError(f"{option} must be at least 1: got {count}")
        seconds = {"--settle": self.settle_s, "--idle": self.idle_s}
        rates = {"--grid": self.grid_g_per_kwh, "--price": self.price_per_kwh}
        for option, number in (seconds | rates).items():
            if number is not None and not 0 <= number < 1e6:
                raise UserError(f"{option} must be from 0 to a million: got {number}")
        for depth in self.depths:
            if depth < 0:
                raise UserError(f"--depths must not be below 0: got {depth}")
        for threads in self.sweep_threads:
            if not 1 <= threads <= 1024:
                raise UserError(f"--sweep-threads must be from 1 to 1024: got {threads}")
        if self.estimate_w and (len(self.estimate_w) != 2 or not 0 <= self.estimate_w[1] <= self.estimate_w[0] < 1e5):
            raise UserError(
                f"--estimate needs watts under load and at rest, the first not below the second:"
                f" got {', '.join(map(str, self.estimate_w))}"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, *, where: str = "the options") -> Options:
        """Read what `to_json` wrote. Raises UserError: not JSON, an unknown key, a value that cannot be."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise UserError(f"{where} must be JSON: {problem}") from problem
        return parse(cls, data, where=where)

    def fit(self, context: int) -> Options:
        """These options for a bundle of `context` tokens: what was left open is chosen, what was asked for is checked.

        Raises UserError: a count that leaves no room for one more token.
        """
        prompt = min(PROMPT_TOKENS, max(1, context // 2)) if self.prompt_tokens is None else self.prompt_tokens
        generate = min(GENERATE_TOKENS, max(1, context // 4)) if self.generate_tokens is None else self.generate_tokens
        if max(prompt, generate) >= context:
            raise UserError(
                f"--prompt and --generate must each be below the context of {context} tokens:"
                f" got {prompt} and {generate}; pass smaller ones, or a larger --context"
            )
        for depth in self.depths:
            if depth + 2 * SWEEP_TOKENS > context:
                raise UserError(
                    f"--depths must leave room for {2 * SWEEP_TOKENS} tokens in the context of {context}: got {depth}"
                )
        return dataclasses.replace(self, prompt_tokens=prompt, generate_tokens=generate)


SWEEP_TOKENS = 16  # read, and then generated, at each depth of the context sweep
