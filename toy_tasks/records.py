"""What an experiment leaves behind: results, claims and their verdicts, written whole or not at all. Needs no torch."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from .config import ToyError, UsageError, convert
from .statistics import Interval, interval

SCHEMA = 1
PUBLISHED = Path(__file__).parent / "results"

T = TypeVar("T")
Setting = bool | int | float | str | tuple[bool | int | float | str, ...]
Verdict = Literal["shown", "not shown", "not measured"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of a paper, in a form that can fail.

    The compared number is the metric `metric` ("part.variant.quantity"), minus the metric `baseline` of the same seed where
    one is named. The claim is shown when the whole 95 % interval of its mean over seeds lies on the right side of `threshold`.
    `expected` says whether it shows at the published size; a claim that does not stays in the table all the same.
    """

    id: str
    sentence: str
    metric: str
    comparison: Literal["<=", ">="]
    threshold: float
    baseline: str | None = None
    expected: bool = True


@dataclasses.dataclass(frozen=True)
class Judged:
    """A claim with what was measured (None if a value was missing or not finite) and the verdict."""

    id: str
    sentence: str
    metric: str
    comparison: Literal["<=", ">="]
    threshold: float
    baseline: str | None
    expected: bool
    mean: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    as_expected: bool


@dataclasses.dataclass(frozen=True)
class Difference:
    """Paired difference to the same quantity of the part's baseline: mean and 95 % interval over seeds."""

    baseline: str
    mean: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number per seed (None where it was not finite), its mean and 95 % interval."""

    values: tuple[float | None, ...]
    mean: float | None
    low: float | None
    high: float | None
    difference: Difference | None


@dataclasses.dataclass(frozen=True)
class Curve:
    """A quantity along the training: `values[seed][i]` was measured after `steps[i]` steps."""

    steps: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclasses.dataclass(frozen=True)
class Versions:
    """What ran."""

    python: str
    torch: str
    numpy: str
    loracle: str


@dataclasses.dataclass(frozen=True)
class Results:
    """One run of one experiment; the fields are the keys of `results.json`."""

    schema: int
    slug: str
    quick: bool
    config: dict[str, Setting]
    seeds: tuple[int, ...]
    device: str
    threads: int
    versions: Versions
    seconds: dict[str, float]  # by part
    metrics: dict[str, Metric]  # "part.variant.quantity"
    curves: dict[str, Curve]
    claims: tuple[Judged, ...]


def summarise(values: Mapping[str, tuple[float | None, ...]], baselines: Mapping[str, str | None]) -> dict[str, Metric]:
    """Metrics from values per seed; `baselines` names the variant of each part to which differences are taken."""
    metrics = {}
    for name, own in values.items():
        part, variant, quantity = name.split(".")
        base = f"{part}.{baselines[part]}.{quantity}"
        difference = None
        if base in values and variant != baselines[part]:
            difference = Difference(base, *_paired(own, values[base]))
        metrics[name] = Metric(own, *interval(own), difference)
    return metrics


def _paired(values: Iterable[float | None], baseline: Iterable[float | None]) -> Interval:
    pairs = zip(values, baseline, strict=True)
    return interval([None if a is None or b is None else a - b for a, b in pairs])


def judge(claim: Claim, metrics: Mapping[str, Metric]) -> Judged:
    """The verdict on a claim. A metric that this run lacks gives "not measured", one that is not finite "not shown"."""
    needed = [claim.metric] + ([claim.baseline] if claim.baseline else [])
    verdict: Verdict
    if any(name not in metrics for name in needed):
        found, verdict = Interval(None, None, None), "not measured"
    else:
        values = metrics[claim.metric].values
        found = _paired(values, metrics[claim.baseline].values) if claim.baseline else interval(values)
        verdict = "shown" if _holds(found, claim) else "not shown"
    as_expected = verdict != "not measured" and (verdict == "shown") == claim.expected
    return Judged(**dataclasses.asdict(claim), **found._asdict(), verdict=verdict, as_expected=as_expected)


def _holds(found: Interval, claim: Claim) -> bool:
    if found.low is None or found.high is None:
        return False
    return found.low >= claim.threshold if claim.comparison == ">=" else found.high <= claim.threshold


def as_text(metric: Metric | Difference | None) -> str:
    """Mean and half of the interval, the latter left out where it rounds to nothing; a count (whole, no spread) as it is."""
    if metric is None:
        return ""
    if metric.mean is None or metric.low is None:
        return "not finite"
    half = metric.mean - metric.low
    if half == 0 and metric.mean % 1 == 0:
        return f"{metric.mean:,.0f}"
    return f"{metric.mean:.3f}" + (f" ± {half:.3f}" if half >= 0.0005 else "")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: an interruption or a full disk leaves what was there before.

    Raises:
        ToyError: the file could not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the bytes are on disk before the name points at them
        os.replace(temporary, path)
    except OSError as error:
        raise ToyError(f"{path} could not be written: {error.strerror or error}. What was there before is untouched.") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass as strict JSON (no NaN), one key a line down to the second level, atomically."""
    tree = dataclasses.asdict(value)
    lines = ",\n".join(f"{json.dumps(key)}: {_json(item)}" for key, item in tree.items())
    write_atomically(path, "{\n" + lines + "\n}\n")


def _json(item: Any) -> str:
    if isinstance(item, dict) and item:
        return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in item.items()) + "\n}"
    if isinstance(item, list | tuple) and item and isinstance(item[0], dict):
        return "[\n" + ",\n".join(f" {json.dumps(value, allow_nan=False)}" for value in item) + "\n]"
    return json.dumps(item, allow_nan=False)


def read_json(path: Path, kind: type[T]) -> T:
    """A dataclass from a JSON file.

    Raises:
        ToyError: the file is missing, truncated, holds NaN, or has an unknown or missing key or a wrong type.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise ToyError(f"{path} could not be read: {error.strerror}") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ToyError(f"{path} is not whole, valid JSON: {error}") from None
    try:
        return convert(tree, kind, str(path))  # type: ignore[no-any-return]
    except UsageError as error:  # the fault lies with the file, not with the command
        raise ToyError(str(error)) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def read_results(path: Path) -> Results:
    """Results as `loracle toy run` wrote them. Raises ToyError as `read_json` does, and for another schema version."""
    results = read_json(path, Results)
    if results.schema != SCHEMA:
        raise ToyError(f"{path} has schema {results.schema}; this version of loracle reads schema {SCHEMA}")
    return results


def differences(published: Results, rerun: Results, tolerances: Mapping[str, float]) -> list[str]:
    """Where a rerun departs from published results, one sentence each: settings, verdicts, metrics beyond their tolerance.

    `tolerances` gives the largest permitted change of a mean, by quantity.
    """
    found = [
        f"setting {key}: published {published.config.get(key)!r}, now {rerun.config.get(key)!r}"
        for key in sorted({*published.config, *rerun.config})
        if published.config.get(key) != rerun.config.get(key)
    ]
    old_claims = {claim.id: claim.verdict for claim in published.claims}
    new_claims = {claim.id: claim.verdict for claim in rerun.claims}
    for key in sorted({*old_claims, *new_claims}):
        old, new = old_claims.get(key, "absent"), new_claims.get(key, "absent")
        if old != new:
            found.append(f"claim {key}: published {old!r}, now {new!r}")
    for key in sorted({*published.metrics, *rerun.metrics}):
        if key not in published.metrics or key not in rerun.metrics:
            found.append(f"metric {key}: {'not published' if key in rerun.metrics else 'no longer measured'}")
            continue
        before, after = published.metrics[key].mean, rerun.metrics[key].mean
        tolerance = tolerances[key.split(".")[-1]]
        if (before is None) != (after is None) or (before is not None and after is not None and abs(before - after) > tolerance):
            found.append(f"metric {key}: published {before}, now {after}, tolerance {tolerance:g}")
    return found
