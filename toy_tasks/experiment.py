"""An experiment: how a task file describes it, how it is found by its file name, and how it runs.

A file `tasks/SLUG.py` holds `QUESTION`, the dataclass `Config`, `QUANTITIES`, `PARTS`, `CLAIMS` and `figure(results)`;
`configs/SLUG.toml` holds its settings. That is all: nothing has to be registered.
"""

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import ToyError, UsageError, load_config, nearest
from .records import SCHEMA, Claim, Curve, Results, Versions, judge, read_json, summarise, write_json

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

TASKS = Path(__file__).parent / "tasks"
REFERENCE = Path(__file__).parent.parent / "reference"


class Quantity(NamedTuple):
    """A measured quantity: its label in tables, and by how much its mean over seeds may differ on another machine."""

    label: str
    tolerance: float


class Trial:
    """What a part is run with: the `seeds` (one model each), the `device`, and a counter of the work done."""

    def __init__(self, seeds: Sequence[int], device: "torch.device | str" = "cpu", report: Callable[[float], None] | None = None) -> None:
        import torch

        self.seeds = tuple(seeds)
        self.device = torch.device(device)
        self._report = report

    def generators(self, stream: int = 0) -> "list[torch.Generator]":
        """One generator per seed, on the CPU, so that every device gets the same draws.

        Different `stream`s of one seed are independent of each other.
        """
        import numpy as np
        import torch

        states = [np.random.SeedSequence([seed, stream]).generate_state(2, np.uint32) for seed in self.seeds]
        return [torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1])) for state in states]

    def counter(self, total: int) -> Callable[[], None]:
        """A function to call once for each of `total` steps; it moves the progress bar."""
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            # At most some hundred reports a part: drawing the bar must cost nothing beside a training step
            if self._report and (done % max(1, total // 200) == 0 or done == total):
                self._report(done / total)

        return tick


class Measurements:
    """What one part measured, by variant and quantity."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[float | None, ...]] = {}
        self.curves: dict[str, Curve] = {}

    def add(self, variant: str, **quantities: "Tensor | Sequence[float]") -> None:
        """Record quantities of a variant, one number per seed each."""
        for quantity, values in quantities.items():
            self.values[f"{variant}.{quantity}"] = _numbers(values)

    def add_curve(self, variant: str, quantity: str, steps: Sequence[int], values: "Tensor") -> None:
        """Record a quantity along the training: `values` (seeds, points). Kept to six digits."""
        rows = tuple(tuple(None if v is None else float(f"{v:.6g}") for v in _numbers(row)) for row in values)
        self.curves[f"{variant}.{quantity}"] = Curve(tuple(steps), rows)


def _numbers(values: "Tensor | Sequence[float]") -> tuple[float | None, ...]:
    """Plain floats, None for those that are not finite."""
    numbers = [float(value) for value in values]
    return tuple(value if math.isfinite(value) else None for value in numbers)


class Part(NamedTuple):
    """One experiment of a task. `baseline` is the variant to which paired differences are taken."""

    name: str
    title: str
    run: Callable[[Any, Trial], Measurements]
    baseline: str | None


class Task(NamedTuple):
    """A task file, checked."""

    slug: str
    question: str
    config: type
    quantities: Mapping[str, Quantity]
    parts: tuple[Part, ...]
    claims: tuple[Claim, ...]
    figure: "Callable[[Results], Figure]"


def find_slugs(folder: Path = TASKS) -> list[str]:
    """Slugs of all experiments, by their files."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def check_slug(slug: str) -> None:
    """Raise UsageError, with the nearest valid slug, unless there is an experiment of this name."""
    if slug not in find_slugs():
        raise UsageError(f"there is no experiment {slug!r}; {nearest(slug, find_slugs())}")


def load_task(slug: str) -> Task:
    """Import the experiment `slug`. Raises UsageError if there is none."""
    check_slug(slug)
    module = importlib.import_module(f".tasks.{slug}", __package__)
    return Task(slug, module.QUESTION, module.Config, module.QUANTITIES, module.PARTS, module.CLAIMS, module.figure)


def describe(slug: str) -> tuple[str, str]:
    """Title of the paper and question of the experiment, read from the source files without importing torch."""
    title = _find_text(REFERENCE / f"{slug}.py", lambda node: isinstance(node, ast.keyword) and node.arg == "title")
    question = _find_text(TASKS / f"{slug}.py", lambda node: isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "QUESTION")
    return title, question


def _find_text(path: Path, wanted: Callable[[ast.AST], bool]) -> str:
    """The text constant that the first wanted node of a Python file assigns, or "" if there is none."""
    if not path.exists():
        return ""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if wanted(node) and isinstance(value := getattr(node, "value", None), ast.Constant):
            return str(value.value)
    return ""


@dataclasses.dataclass(frozen=True)
class _Finished:
    """A finished part on disk, with all that its numbers depend on."""

    fingerprint: str
    seconds: float
    values: dict[str, tuple[float | None, ...]]
    curves: dict[str, Curve]


def run(
    task: Task,
    config: Any,
    *,
    seeds: Sequence[int],
    out: Path,
    device: str = "cpu",
    quick: bool = False,
    report: Callable[[str, float], None] | None = None,
) -> Results:
    """Run all parts of a task and write `out/results.json`.

    Computes on one CPU thread, whatever torch is set to: models this small gain little from a second one, and lose a lot
    (measured: 16 s became 190 s) when other programs want the cores. It also makes the numbers independent of their count.

    Each finished part is kept in `out/parts` until the whole run is written, so that an interrupted run, started again
    with the same settings and code, goes on after its last finished part. `report(part, fraction)` is called as the work
    proceeds. `quick` only marks the results.

    Raises:
        UsageError: fewer than two seeds, or a device that is not there.
        ToyError: the results could not be written.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(task, config, seeds, out, device, quick, report)
    finally:
        torch.set_num_threads(threads)


def _run(
    task: Task, config: Any, seeds: Sequence[int], out: Path, device: str, quick: bool, report: Callable[[str, float], None] | None
) -> Results:
    import numpy as np
    import torch

    if len(set(seeds)) < max(2, len(seeds)):
        raise UsageError(f"seeds are {list(seeds)}; needed two or more different ones, since an interval is taken over them")
    device_name = _check_device(device)
    versions = Versions(platform.python_version(), torch.__version__, np.__version__, version("loracle"))
    settings = dataclasses.asdict(config)
    dependencies = (settings, list(seeds), device_name, torch.get_num_threads(), versions, _code_digest(task))
    fingerprint = hashlib.sha256(repr(dependencies).encode()).hexdigest()

    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:  # better now than after the first part
        raise ToyError(f"{out} cannot hold results: {error.strerror}") from None
    values: dict[str, tuple[float | None, ...]] = {}
    curves: dict[str, Curve] = {}
    seconds: dict[str, float] = {}
    for part in task.parts:
        finished = _run_part(part, config, seeds, device, out, fingerprint, report)
        values |= {f"{part.name}.{key}": value for key, value in finished.values.items()}
        curves |= {f"{part.name}.{key}": curve for key, curve in finished.curves.items()}
        seconds[part.name] = finished.seconds
    metrics = summarise(values, {part.name: part.baseline for part in task.parts})
    claims = tuple(judge(claim, metrics) for claim in task.claims)
    results = Results(
        SCHEMA, task.slug, quick, settings, tuple(seeds), device_name, torch.get_num_threads(), versions, seconds, metrics, curves, claims
    )
    write_json(out / "results.json", results)
    for part in task.parts:
        _part_file(out, part).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something that is not ours lies in the folder
        (out / "parts").rmdir()
    return results


def _part_file(out: Path, part: Part) -> Path:
    return out / "parts" / f"{part.name}.json"


def _run_part(
    part: Part, config: Any, seeds: Sequence[int], device: str, out: Path, fingerprint: str, report: Callable[[str, float], None] | None
) -> _Finished:
    """A part's measurements: from disk if it finished before under the same fingerprint, else run now and kept on disk."""
    path = _part_file(out, part)
    if path.exists():
        try:
            kept: _Finished | None = read_json(path, _Finished)
        except ToyError:
            kept = None  # of another version of this file: run again
        if kept and kept.fingerprint == fingerprint:
            if report:
                report(part.name, 1.0)
            return kept
    start = time.perf_counter()
    measured = part.run(config, Trial(seeds, device, report and (lambda fraction: report(part.name, fraction))))
    finished = _Finished(fingerprint, round(time.perf_counter() - start, 3), measured.values, measured.curves)
    write_json(path, finished)
    return finished


def _check_device(device: str) -> str:
    """The device's name for the record."""
    import torch

    if device == "cpu":
        return f"cpu ({platform.machine()})"
    if device == "cuda" and torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    reason = "torch sees no CUDA device here" if device == "cuda" else nearest(device, ("cpu", "cuda"))
    raise UsageError(f"device {device!r} cannot be used; {reason}")


def _code_digest(task: Task) -> str:
    """A digest of the source that a part's numbers can depend on."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    files = [file for folder in (REFERENCE, here, here / "methods") for file in sorted(folder.glob("*.py"))]
    module = sys.modules.get(task.config.__module__)
    if module is not None and module.__file__:
        files.append(Path(module.__file__))
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load(slug: str, *, quick: bool = False, overrides: Sequence[str] = ()) -> tuple[Task, Any]:
    """An experiment and its settings, ready for `run`. Raises UsageError for a wrong slug or setting."""
    task = load_task(slug)
    return task, load_config(task.config, slug, quick=quick, overrides=overrides)
