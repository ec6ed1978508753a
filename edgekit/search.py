"""Search for the recipe of a size: optuna over compositions of dropping, pruning, factors and bits.

A trial draws how many layers go, what share is pruned and what factors leave, and a size up to the target;
`edgekit.compose` finds the best plan for these numbers and predicts loss, size and milliseconds a token. Bits alone is
the first trial of every study. Two things are made small, size and loss; a latency beyond the limit is a constraint.
A study lives in a storage: a file that many processes append to (optuna's journal), or a database by its URL, also
from several machines. Whoever opens it adds trials until there are `trials` of them, so a search that was killed goes
on, and one that is done costs nothing.

Predictions rank compositions of one kind well and different kinds badly (they underestimate what structure costs), so
`confirmed` builds the best bits-only recipe and the best others and takes the one whose predictions are nearest to the
source's, in KL on windows of the calibration text that no step has seen.
Source: optuna, Akiba et al., arXiv 1907.10902; sampler: multi-objective tree-structured Parzen estimator.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compose import Candidate, Composition, Sensitivity, composed
from edgekit.device import Device, load_device
from edgekit.errors import BudgetError, UserError
from edgekit.search_plot import Dot, write_front
from edgekit.step import CalibrationOptions

if TYPE_CHECKING:
    import optuna

STEP = 0.02  # of shares
MOST_PRUNED, LEAST_RANK = 0.4, 0.7
LEAST_SIZE = 0.75  # of the target, for the front
CHECK_WINDOWS = 4


@dataclass(frozen=True)
class Goal:
    """size_mb: at most so much for codes and vectors. latency_ms: of a token's products on `device`; 0 for no limit."""

    size_mb: float
    device: str = ""
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.size_mb > 0:
            raise UserError(f"a size must be above 0 MB: got {self.size_mb}")
        if self.latency_ms < 0 or (self.latency_ms and not self.device):
            raise UserError(f"--target-latency-ms must be above 0 and needs --device: got {self.latency_ms}")
        self.profile  # noqa: B018  it checks the name

    def study(self, found: Sensitivity) -> str:
        """The name of the study for this goal, model and text: a storage may hold many."""
        limit = f" {self.device} {self.latency_ms:g} ms" if self.device else ""
        return f"edgekit {self.size_mb:g} MB{limit} {found.model[:12]} {found.text[:12]}"

    @property
    def profile(self) -> Device | None:
        return load_device(self.device) if self.device else None


def search(
    found: Sensitivity,
    goal: Goal,
    storage: str,
    *,
    trials: int = 100,
    jobs: int = 1,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Candidate]:
    """The Pareto front of size and loss among candidates that meet the goal, of least loss first.

    `storage` is a file for a journal, or a database URL. `jobs` processes work beside each other.
    Raises UserError: optuna is not installed, trials or jobs below 1; BudgetError: nothing meets the goal.
    """
    if trials < 1 or jobs < 1:
        raise UserError(f"trials and jobs must be at least 1: got {trials} and {jobs}")
    name = goal.study(found)
    study = _study(storage, name, seed)
    if not study.trials:
        study.enqueue_trial({"layers": 0, "prune": 0.0, "rank": 1.0, "size_mb": goal.size_mb}, skip_if_exists=True)
    if jobs == 1:
        _work(found, goal, storage, trials, seed, report)
    else:
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=_work, args=(found, goal, storage, trials, seed + index)) for index in range(jobs)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise UserError(f"a process of the search ended early: {[worker.exitcode for worker in workers]}")
    return front(_study(storage, name), found, goal)


def front(study: optuna.Study, found: Sensitivity, goal: Goal) -> list[Candidate]:
    """The best candidates of a study. Raises BudgetError: none meets the goal."""
    made = []
    for trial in study.trials:
        if trial.values is not None and trial.user_attrs["late_ms"] <= 0:
            made.append((trial.values[1], trial.values[0], Composition(**trial.params)))
    made.sort(key=lambda row: row[:2])
    best, smallest = [], np.inf
    for _, size, composition in made:
        if size < smallest:
            best.append(composed(found, composition, goal.profile))
            smallest = size
    if not best:
        limit = f" and {goal.latency_ms} ms on {goal.device}" if goal.latency_ms else ""
        raise BudgetError(f"no composition meets {goal.size_mb} MB{limit}: ask for more")
    return best


def _work(
    found: Sensitivity,
    goal: Goal,
    storage: str,
    trials: int,
    seed: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Add trials to the study until there are so many."""
    optuna = _optuna()
    study, device = _study(storage, goal.study(found), seed), goal.profile

    def objective(trial: Any) -> tuple[float, float]:
        wanted = Composition(
            layers=trial.suggest_int("layers", 0, len(found.drops) // 3),
            prune=trial.suggest_float("prune", 0.0, MOST_PRUNED, step=STEP),
            rank=trial.suggest_float("rank", LEAST_RANK, 1.0, step=STEP / 2),
            size_mb=trial.suggest_float("size_mb", LEAST_SIZE * goal.size_mb, goal.size_mb),
        )
        try:
            made = composed(found, wanted, device)
        except BudgetError as problem:
            raise optuna.TrialPruned(str(problem)) from problem
        trial.set_user_attr("latency_ms", made.latency_ms)
        late_ms = made.latency_ms - goal.latency_ms if goal.latency_ms else 0.0
        trial.set_user_attr("late_ms", late_ms)
        trial.set_constraint("late_ms", late_ms)
        return made.size_bytes / 1e6, made.loss

    over = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)

    def stop(study: Any, trial: Any) -> None:
        done = len(study.get_trials(deepcopy=False, states=over))
        report(min(done, trials), trials)
        if done >= trials:
            study.stop()

    if len(study.get_trials(deepcopy=False, states=over)) < trials:
        study.optimize(objective, callbacks=[stop])


def _study(storage: str, name: str, seed: int = 0) -> optuna.Study:
    optuna = _optuna()
    place: Any = storage
    if "://" not in storage:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        place = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    return optuna.create_study(
        study_name=name, storage=place, sampler=sampler, directions=["minimize", "minimize"], load_if_exists=True
    )


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as problem:
        raise UserError("a search needs optuna: pip install 'edgekit[compress]', or name a recipe with -r") from problem
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    import warnings

    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


# --- which of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Confirmed:
    """A candidate that was built: its folder, and its KL to the source in nats a token on unseen windows."""

    candidate: Candidate
    folder: Path
    kl: float


def contenders(best: Sequence[Candidate], found: Sensitivity, goal: Goal, count: int) -> list[Candidate]:
    """The `count` to be built: bits alone where they meet the goal, and those of least predicted loss that differ."""
    chosen = []
    with suppress(BudgetError):  # bits alone may not get so small
        alone = composed(found, Composition(size_mb=goal.size_mb), goal.profile)
        if not goal.latency_ms or alone.latency_ms <= goal.latency_ms:
            chosen.append(alone)
    for candidate in best:
        known = [(one.composition.layers, one.composition.prune, one.composition.rank) for one in chosen]
        made = candidate.composition
        if (made.layers, made.prune, made.rank) not in known:
            chosen.append(candidate)
    return chosen[:count]


def confirmed(
    source: Checkpoint,
    candidates: Sequence[Candidate],
    text: CalibrationOptions,
    folder: Path,
    *,
    compute: str = "cpu",
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Confirmed]:
    """Build the candidates in `folder`, those that stand there already as they are; the nearest to the source first."""
    from edgekit.compress import compress

    built = []
    for index, candidate in enumerate(candidates, 1):
        title = f"{index} of {len(candidates)}, {candidate.composition}"
        recipe = candidate.recipe("search", text)
        output = folder / f"candidate-{recipe.sha256[:16]}"
        if not output.exists():
            compress(
                source,
                recipe,
                output,
                resume=True,
                compute=compute,
                on_progress=lambda state: report(f"building {title}", state.done, state.total),  # noqa: B023
            )
        built.append(
            Confirmed(candidate, output, divergence_of(source, open_checkpoint(output), text, compute=compute))
        )
    return sorted(built, key=lambda one: one.kl)


def divergence_of(source: Checkpoint, other: Checkpoint, text: CalibrationOptions, *, compute: str = "cpu") -> float:
    """KL(source || other) in nats a token, on windows of the text beyond those that steps are calibrated on."""
    import dataclasses

    import torch

    from edgekit.model.torch_view import Layer, rms_norm, torch_device
    from edgekit.model.windows import token_windows

    more = dataclasses.replace(text, samples=text.samples + CHECK_WINDOWS)
    ids = token_windows(source, more, seed=0).ids[text.samples :]
    total, count, on = 0.0, 0, torch_device(compute)
    with torch.inference_mode():
        for row in ids:
            logits = []
            for model in (source, other):
                config = model.decoder
                table = torch.from_numpy(model.weight("model.embed_tokens").dense()).to(on)
                x = table[torch.from_numpy(row).to(on)][None]
                for index in range(config.layers):
                    x = Layer.of(model.read_block(f"layers.{index}"), config, on)(x)
                gain = torch.from_numpy(model.vector("model.norm.weight")).to(on)
                head = table if config.tied else torch.from_numpy(model.weight("lm_head").dense()).to(on)
                logits.append(torch.log_softmax(rms_norm(x[0], gain, config.norm_eps) @ head.T, dim=-1))
            total += float((logits[0].exp() * (logits[0] - logits[1])).sum())
            count += len(row)
    return total / count


# --- the plot ---------------------------------------------------------------------------------------------------------


def write_plot(storage: str, found: Sensitivity, best: Sequence[Candidate], goal: Goal, path: Path) -> None:
    """All trials and the front in one page (`edgekit.search_plot`). Raises UserError: `path` is no .html."""
    tried = [
        Dot(trial.values[0], trial.values[1], str(Composition(**trial.params)))
        for trial in _study(storage, goal.study(found)).trials
        if trial.values is not None
    ]
    front = [Dot(one.size_bytes / 1e6, one.loss, str(one.composition)) for one in best]
    limit = f" and {goal.latency_ms:g} ms on {goal.device}" if goal.latency_ms else ""
    write_front(tried, front, path, title=f"{len(tried)} compositions within {goal.size_mb:g} MB{limit}")
