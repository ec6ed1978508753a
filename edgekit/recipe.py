"""The recipe: which steps to take, in order, with which options. A person writes it as TOML.

    name = "mine"
    description = "one line for the model card"      # may be left out
    seed = 0                                         # may be left out

    [calibration]                                    # for steps that need text; may be left out
    files = ["text.jsonl.gz"]                        # beside this file; --calibration goes before them
    samples = 16

    [[step]]
    use = "quant.int4"
    block = 64                                       # each step's options stand beside `use`

It is strict: an unknown key, step or value is an error that names the nearest known one and the place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgekit.errors import UserError
from edgekit.schema import nearest, parse
from edgekit.step import CalibrationOptions, Step, options, step_class

BUILT_IN = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """Steps in order. `seed` is the one source of randomness for all of them."""

    name: str
    description: str
    steps: tuple[Step, ...]
    seed: int = 0
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError("name must not be empty")
        if not self.steps:
            raise UserError("a recipe must have at least one [[step]]")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be from 0 to 2**63 - 1: got {self.seed}")

    def resolved(self) -> str:
        """The recipe as TOML with every default filled in; `load_recipe` reads it back to an equal recipe."""
        lines = [f"{key} = {_toml(getattr(self, key))}" for key in ("name", "description", "seed")]
        if self.calibration != CalibrationOptions():
            table = dataclasses.asdict(self.calibration)
            lines += ["", "[calibration]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
        for step in self.steps:
            lines += ["", "[[step]]", f"use = {_toml(step.name)}"]
            lines += [f"{key} = {_toml(value)}" for key, value in options(step).items()]
        return "\n".join(lines) + "\n"

    @property
    def sha256(self) -> str:
        """The digest of the resolved recipe as canonical JSON: the same for two texts that mean the same."""
        steps = [{"use": step.name, **options(step)} for step in self.steps]
        for step in steps:
            step.pop("data", None)  # which text it is, its own digest says
        data: dict[str, object] = {"name": self.name, "description": self.description, "seed": self.seed, "step": steps}
        windows = {"samples": self.calibration.samples, "length": self.calibration.length}
        if windows != {"samples": CalibrationOptions.samples, "length": CalibrationOptions.length}:
            data["calibration"] = windows  # which text it is, its own digest says
        canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class _File:
    """A recipe's TOML before its steps are known."""

    name: str
    step: tuple[dict[str, object], ...] = ()
    description: str = ""
    seed: int = 0
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A built-in recipe by name (`int4`), or one from a TOML file.

    Raises UserError naming the file and key: no such recipe, not TOML, an unknown key or step, an option out of range.
    """
    path = _find(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise UserError(f"a recipe must be a readable TOML file: {path} ({problem})") from problem
    recipe = parse_recipe(text, where=str(path))
    beside = tuple(str(path.parent / file) for file in recipe.calibration.files)  # an absolute path stays
    steps = tuple(_beside(step, path.parent) for step in recipe.steps)
    return replace(recipe, steps=steps, calibration=replace(recipe.calibration, files=beside))


def parse_recipe(text: str, *, where: str) -> Recipe:
    """A recipe from its TOML. Raises UserError as `load_recipe`; `where` names the text for messages."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"a recipe must be a readable TOML file: {where} ({problem})") from problem
    file = parse(_File, data, where=where)
    steps = tuple(_step(table, where=f"{where}, step[{i}]") for i, table in enumerate(file.step))
    try:
        return Recipe(file.name, file.description, steps, file.seed, file.calibration)
    except UserError as problem:
        raise UserError(f"{where}: {problem}") from problem


def calibrated_on(recipe: Recipe, files: Sequence[Path]) -> Recipe:
    """The recipe with these calibration files; as it is when there are none."""
    names = tuple(str(file) for file in files)
    return replace(recipe, calibration=replace(recipe.calibration, files=names)) if names else recipe


def within(recipe: Recipe, target_mb: float) -> Recipe:
    """The recipe whose step with a `target_mb` plans anew for this size. Raises UserError: it has no such step."""
    steps = tuple(
        replace(step, target_mb=target_mb, plan=()) if "target_mb" in options(step) else step  # type: ignore[type-var]
        for step in recipe.steps
    )
    if steps == recipe.steps and not any("target_mb" in options(step) for step in steps):
        raise UserError(f"a size needs a recipe with a step that plans for one, such as mixed: {recipe.name} has none")
    return replace(recipe, steps=steps)


def built_in_recipes() -> tuple[str, ...]:
    """The names of the recipes that come with edgekit, sorted."""
    return tuple(sorted(path.stem for path in BUILT_IN.glob("*.toml")))


def _beside(step: Step, folder: Path) -> Step:
    """The step with its text files named from where the recipe lies."""
    files = options(step).get("data")
    if not isinstance(files, list):
        return step
    return replace(step, data=tuple(str(folder / file) for file in files))  # type: ignore[type-var]


def _find(name_or_path: str | Path) -> Path:
    names = built_in_recipes()
    if name_or_path in names:
        return BUILT_IN / f"{name_or_path}.toml"
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(
            f"a recipe must be a built-in name or a TOML file: got {str(name_or_path)!r}"
            f"{nearest(path.name.removesuffix('.toml'), names)}"
        )
    return path


def _step(table: dict[str, object], *, where: str) -> Step:
    use = table.get("use")
    if not isinstance(use, str):
        raise UserError(f"{where}: the key 'use' must name a step" + ("" if use is None else f": got {use!r}"))
    values = {key: value for key, value in table.items() if key != "use"}
    return parse(step_class(use, where=where), values, where=where)


def _toml(value: Any) -> str:
    """A TOML value. JSON spells strings, numbers, booleans and lists the same, but for the one character DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
