"""Examples to rows of tokens, rows to batches. The prompt is masked in the loss; the order depends on seed and step alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..config import UsageError
from .hub import in_a_line, no_hub

IGNORED = -100  # the label that the loss leaves out
KNOWN_FIELDS = (("instruction", "response"), ("query", "response"), ("instruction", "output"), ("question", "answer"), ("text",))

Row = dict[str, list[int]]  # input_ids, labels and, in packed rows, position_ids
Example = Mapping[str, Any]


class Split(NamedTuple):
    """Examples to train on, and others that are held out."""

    train: list[Example]
    held_out: list[Example]


def read_examples(source: str, *, samples: int | None = None) -> list[Example]:
    """The examples of a JSONL file (if `source` ends with .jsonl or .json) or of the training split of a data set on the hub.

    Raises:
        UsageError: the file is missing, has a line that is no JSON object, or the hub has no such data set.
    """
    if source.endswith((".jsonl", ".json")) or Path(source).exists():
        return _read_lines(Path(source))[:samples]
    why = no_hub(source)
    from datasets import load_dataset

    try:
        loaded = load_dataset(source, split="train" if samples is None else f"train[:{samples}]")
    except Exception as error:  # the library's errors have no common type
        raise UsageError(f"the data {source!r} is neither a file here nor to be had from the hub: {why or in_a_line(error)}") from error
    return list(loaded)


def _read_lines(path: Path) -> list[Example]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"the data {path} could not be read: {error.strerror}") from None
    examples: list[Example] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                example = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number} is no JSON: {error}") from None
            if not isinstance(example, dict):
                raise UsageError(f"{path}, line {number} is no JSON object but {line[:40]!r}")
            examples.append(example)
    if not examples:
        raise UsageError(f"{path} has no examples; needed one JSON object a line")
    return examples


def find_fields(examples: Sequence[Example], fields: Sequence[str], where: str) -> tuple[str, ...]:
    """The fields with instruction and response, or with plain text: those asked for, or a known pair that the examples have.

    Raises UsageError, with the fields that there are, if an example lacks one.
    """
    there = list(examples[0])
    if not fields:
        fields = next((known for known in KNOWN_FIELDS if set(known) <= set(there)), ())
    if not 1 <= len(fields) <= 2:
        raise UsageError(f"{where} has the fields {', '.join(there)}; say which are instruction and response with --fields A,B")
    for number, example in enumerate(examples, start=1):
        for field in fields:
            if not isinstance(example.get(field), str):
                raise UsageError(f"{where}, example {number} has no text in the field {field!r}; it has: {', '.join(example)}")
    return tuple(fields)


def tokenise(examples: Sequence[Example], tokenizer: Any, *, fields: Sequence[str], template: str, length: int) -> list[Row]:
    """One row per example, cut at `length` tokens: the prompt, masked, then the response and the end of text.

    With one field the whole text is learnt. Examples without any token to learn are left out.
    """
    rows = []
    for example in examples:
        prompt = template.replace("{instruction}", example[fields[0]]) if len(fields) == 2 else ""
        head = tokenizer(prompt).input_ids
        tail = [*tokenizer(example[fields[-1]], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids, labels = (head + tail)[:length], ([IGNORED] * len(head) + tail)[:length]
        if any(label != IGNORED for label in labels[1:]):
            rows.append({"input_ids": ids, "labels": labels})
    return rows


def pack(rows: Sequence[Row], length: int) -> list[Row]:
    """Rows joined, in order, to rows of at most `length` tokens. Positions start again with every example, by which
    transformers keeps the examples from attending to each other; no token is predicted from the example before."""
    packed: list[Row] = []
    for row in rows:
        size = len(row["input_ids"])
        if not packed or len(packed[-1]["input_ids"]) + size > length:
            packed.append({"input_ids": [], "labels": [], "position_ids": []})
        packed[-1]["input_ids"] += row["input_ids"]
        packed[-1]["labels"] += [IGNORED, *row["labels"][1:]]
        packed[-1]["position_ids"] += range(size)
    return packed


def collate(rows: Sequence[Row], padding: int) -> dict[str, Tensor]:
    """Rows filled up on the right to one length. A causal model never sees what is right of a token, so no mask is needed.

    A first token, which nothing predicts, is no label: transformers would count it, but for the models that it knows to shift.
    """
    fill = {"input_ids": padding, "labels": IGNORED, "position_ids": 0}
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {key: torch.tensor([row[key] + [fill[key]] * (longest - len(row[key])) for row in rows]) for key in rows[0]}
    batch["labels"][:, 0] = IGNORED
    return batch


class Order(Sampler[list[int]]):
    """Which rows each micro-batch of this rank takes, from the micro-batches of step `first` on.

    Every epoch has its own permutation, drawn from (seed, epoch); a global batch is the next `batch_size` rows of it, cut
    into accumulation x ranks x micro-batch. So the order is a function of the step, and resuming needs no state; two ranks
    together see what one sees. Rows that fill no batch are left out of the epoch.
    """

    def __init__(
        self, rows: int, *, batch_size: int, micro_batch: int, steps: int, seed: int, first: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        if rows < batch_size:
            raise UsageError(f"the data has {rows} rows and a batch {batch_size}; use a smaller batch_size or more data")
        self.rows, self.batch_size, self.micro_batch, self.seed = rows, batch_size, micro_batch, seed
        self.first, self.steps, self.rank, self.ranks = first, steps, rank, ranks
        self.accumulation = batch_size // (micro_batch * ranks)

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.rows // self.batch_size
        for step in range(self.first, self.steps):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or step == self.first:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.rows, generator=generator)
            own = order[batch * self.batch_size :][: self.batch_size].view(self.accumulation, self.ranks, self.micro_batch)[:, self.rank]
            yield from own.tolist()
