"""What a run is decided by: a paper's table [full], with what the user changes, and no unknown left. Needs no torch."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from ..config import FullScale, UsageError, convert, load_full, nearest, parse_overrides, read_toml

CAUSAL = "causal language model"
NAME = re.compile(r"[\w./~-]+")  # a hub id or a file
SMALL = "small"  # the model and the data that are built here
PAPER = "paper"  # the model and the data of the paper's config

# Where a paper's source does not say, a run has to take something. These are ours, and every report marks them so.
ASSUMED: Mapping[str, Any] = {
    "rank": 8,
    "alpha": 16.0,
    "dropout": 0.0,
    "optimizer": "adamw",
    "lr": 2e-4,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "warmup_ratio": 0.03,
    "batch_size": 32,
    "epochs": 1.0,
    "sequence_length": 1024,
    "precision": "bf16",
}
# Keys of [full] that a run does not take with --set
INSTEAD = {
    "model": "use --model",
    "data": "use --data",
    "seeds": "that is how many seeds the paper's figures are means of; a run has one, --seed",
}
DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32", "fp32": "float32", "float64": "float64"}
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
ENGINES = ("auto", "single", "ddp", "fsdp")
# Rows that the gradients before training are estimated from at once. Sums of other groups are rounded otherwise, and a start
# from their singular vectors may then have other signs: so it depends on neither micro_batch nor the number of processes.
ROWS_OF_ESTIMATE = 1
FILE_BYTES = 2**30  # a checkpoint's tensors go into files of about so many bytes, each of which is put together before it is written
# These change how a run is computed and not what, up to the rounding of sums: a run may be resumed with others. One exception:
# each micro-batch of each process draws its own dropout.
HOW = ("engine", "micro_batch", "compile", "gradient_checkpointing", "changed", "assumed")

Engine = Literal["auto", "single", "ddp", "fsdp"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a run is decided by."""

    method: str
    options: dict[str, bool | int | float | str]
    model: str  # a hub id, a folder, or "small"
    data: str  # a hub id, a JSONL file, or "small"
    held_out: str | None  # a JSONL file; None: a part of the data that is not trained on
    target_modules: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float
    optimizer: str
    lr: float
    weight_decay: float
    schedule: str
    warmup_ratio: float
    batch_size: int  # rows in one optimizer step, over all ranks and accumulation
    micro_batch: int | None  # rows that one rank puts through the model at once; None: its share of the batch
    epochs: float
    steps: int | None  # instead of epochs
    sequence_length: int
    precision: str
    seed: int
    samples: int | None  # only the first so many examples of the data
    fields: tuple[str, ...]  # of an example: instruction and response, or one of plain text; empty: found by name
    template: str  # the prompt, with {instruction} in it
    packing: bool
    gradient_checkpointing: bool
    compile: bool
    engine: Engine
    assumed: tuple[str, ...]  # keys that the paper's source leaves unknown: their values are ours
    changed: tuple[str, ...]  # keys that are not as in the paper's config

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ValueError(f"precision is {self.precision!r}; {nearest(self.precision, DTYPES)} (float16 would need gradient scaling)")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; {nearest(self.schedule, SCHEDULES)}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}; {nearest(self.engine, ENGINES)}")
        for name in ("rank", "batch_size", "sequence_length", "lr", "samples"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {value!r}; needed a positive number")
        if "{instruction}" not in self.template:
            raise ValueError(f"the template {self.template!r} lacks {{instruction}}, which stands for an example's instruction")

    def rows_at_once(self, ranks: int = 1) -> int:
        """The micro-batch of each of so many ranks.

        Raises UsageError if micro-batches of that size cannot make up the batch.
        """
        rows = self.micro_batch or max(1, self.batch_size // ranks)
        if self.batch_size % (rows * ranks):
            raise UsageError(f"batch_size is {self.batch_size}; needed a multiple of micro-batch {rows} times {ranks} process(es)")
        return rows

    @property
    def pattern(self) -> str:
        """The regular expression that the full name of an adapted layer matches."""
        return rf"(.*\.)?({'|'.join(re.escape(name) for name in self.target_modules)})"

    @property
    def dtype_name(self) -> str:
        """torch's name of the precision of the pretrained weights."""
        return DTYPES[self.precision]


def resolve(
    source: str,
    *,
    method: str | None = None,
    model: str | None = None,
    data: str | None = None,
    overrides: Sequence[str] = (),
    **how: Any,
) -> Run:
    """The run that `source` (a paper's slug, or a file with a table [full] like `configs/SLUG.toml`) asks for.

    A slug without `model` is a trial with the small model and `small.toml`; "paper" takes the config's. A file's model is
    taken as it says. `method` puts a baseline, or another paper's method with its defaults, in the place of the config's.
    `overrides` are texts `key=value` for the keys of [full]; `how` are fields of `Run` that [full] does not have.

    Raises:
        UsageError: a file, method, key or value is wrong, or the config names no model or data to run and none was given.
    """
    from ..methods import make, names

    full, slug = read(source)
    chosen = method or slug
    if chosen not in names():
        hint = "" if method else " (a config file is named after its method, or --method tells it)"
        raise UsageError(f"there is no method {chosen!r}{hint}; {nearest(chosen, names())}")
    model = model or (SMALL if source == slug else full.model)
    values: dict[str, Any] = {field.name: getattr(full, field.name) for field in dataclasses.fields(full)}
    unknown = [key for key in ASSUMED if values[key] == "unknown"]
    values |= {key: ASSUMED[key] for key in unknown}
    given = parse_overrides(overrides, FullScale)
    names_of_run = {field.name for field in dataclasses.fields(Run)}
    known = sorted(values.keys() & names_of_run - INSTEAD.keys())
    for key in given:
        if key in INSTEAD:
            raise UsageError(f"--set {key}: {INSTEAD[key]}")
        if key not in known:
            raise UsageError(f"--set {key}: a run takes no such key of [full]; {nearest(key, known)}")
    small = small_settings(chosen) if model == SMALL else {}
    values |= small | given
    values["model"] = full.model if model == PAPER else model
    values["data"] = full.data if data == PAPER or (data is None and model != SMALL) else (data or SMALL)
    _check_names(full, slug, values)
    if "samples" not in given and values["data"] != full.data:
        values["samples"] = "all"  # the number is that of the config's data
    elif values["samples"] == "unknown":
        values["samples"] = "all"
        unknown.append("samples")
    if how.get("samples") is not None:
        given["samples"] = how["samples"]
    if (values["data"] == SMALL) != (values["model"] == SMALL) and values["data"] == SMALL:
        raise UsageError("the small data goes with the small model only; give a hub id or a JSONL file with --data")
    # A baseline starts from the same settings; the options belong to the paper's own method
    options = values["options"] if chosen == slug or "options" in given else {}
    if "unknown" in options.values():
        own = make(chosen)
        options = {key: getattr(own, key, value) if value == "unknown" else value for key, value in options.items()}
        unknown.append("options")
    changed = sorted({*small, *given} | {key for key in ("model", "data") if values[key] != getattr(full, key)})
    table = {key: value for key, value in values.items() if key in names_of_run} | {
        "method": chosen,
        "options": options,
        "steps": None,
        "samples": None if values["samples"] == "all" else values["samples"],
        "held_out": None,
        "seed": 0,
        "fields": (),
        "template": "Q: {instruction}\nA: " if values["data"] != SMALL else "{instruction}",
        "micro_batch": None,
        "packing": False,
        "gradient_checkpointing": False,
        "compile": False,
        "engine": "auto",
        "assumed": tuple(key for key in unknown if key not in given and key not in small),
        "changed": tuple(changed),
    }
    table |= {key: value for key, value in how.items() if value is not None}
    return convert(table, Run, "the run")  # type: ignore[no-any-return]


def _check_names(full: FullScale, slug: str, values: Mapping[str, Any]) -> None:
    """Refuse a model or data set of the config that is none to train a causal language model with."""
    taken = [key for key in ("model", "data") if values[key] == getattr(full, key)]
    if taken and full.task not in (CAUSAL, "unknown"):
        misfits = f"target_modules ({', '.join(full.target_modules)})"
        misfits += f" and precision ({full.precision})" if full.precision not in (*DTYPES, "unknown") else ""
        raise UsageError(
            f"the setting of {slug} is {full.task} ({full.model}, {full.data}), and only causal language models can be trained here; "
            f"give one with --model ID --data FILE, and change with --set what does not fit it, such as {misfits}"
        )
    for key in taken:
        if values[key] == "unknown":
            raise UsageError(f"the {key} of this run is unknown in its source; give one with --{key}")
        if not NAME.fullmatch(values[key]) and not Path(values[key]).exists():
            raise UsageError(f"the {key} of this run is described in its config and not named: {values[key]!r}; give one with --{key}")


def read(source: str) -> tuple[FullScale, str]:
    """Table [full] of a paper's config or of a file, and the slug of its method."""
    from ..config import CONFIGS

    if source.endswith(".toml"):
        path = Path(source)
        return load_full(path.stem, folder=path.parent), path.stem
    known = [path.stem for path in CONFIGS.glob("*.toml") if "full" in read_toml(path)]
    if source not in known:
        raise UsageError(f"there is no config {source!r}; {nearest(source, known)}; or give the path of a .toml file")
    return load_full(source), source


def default_folder(run: Run) -> Path:
    """Where a run is kept unless told otherwise: each method on each model apart; of the small model by the method alone."""
    name = re.sub(r"[^\w.-]", "", run.model.rstrip("/").rpartition("/")[2])
    return Path("runs") / "full" / (run.method if run.model == SMALL else f"{run.method}-{name}")


def small_settings(method: str) -> dict[str, Any]:
    """The settings of a trial, `small.toml`, for one method."""
    tables = read_toml(Path(__file__).with_name("small.toml"))
    rates = tables["lr"]
    return {**tables["run"], "lr": rates.get(method, rates["default"])}


def differences(old: Run, new: Run) -> list[str]:
    """What was decided differently in two runs, one sentence each; how they are computed does not count."""
    pairs = ((key, getattr(old, key), getattr(new, key)) for key in get_type_hints(Run) if key not in HOW)
    return [f"{key} was {before!r} and is now {after!r}" for key, before, after in pairs if before != after]
