"""Evaluation of a run or of any model: what `loracle full eval` does."""

import json
from pathlib import Path
from typing import Any

import torch

from ..config import UsageError, nearest
from ..records import write_atomically
from . import checkpoints
from .data import find_fields, read_examples, tokenise
from .engine import Engine
from .evaluation import exact_match, perplexity
from .exports import CONFIG, READING, load_adapter, load_trained
from .training import Report, load_model, silent

KINDS = ("perplexity", "exact_match")
TEMPLATE, LENGTH, ANSWER = "Q: {instruction}\nA: ", 1024, 256


def load_any(target: str, *, cache: Path | None = None) -> tuple[Any, Any, str, int]:
    """Model, tokenizer, prompt template and row length of a run's folder, a folder with a model or an adapter, or a hub id."""
    if checkpoints.find(Path(target)):
        trained = load_trained(Path(target), cache=cache)
        return trained.model, trained.tokenizer, trained.run.template, trained.run.sequence_length
    folder = Path(target)
    model, tokenizer = load_adapter(folder) if (folder / CONFIG).exists() else load_model(target, torch.float32)
    found = json.loads((folder / READING).read_text(encoding="utf-8")) if (folder / READING).exists() else {}
    return model.eval(), tokenizer, found.get("template", TEMPLATE), found.get("sequence_length", LENGTH)


def measure(
    target: str,
    data: str,
    kind: str,
    *,
    fields: tuple[str, ...] | None = None,
    template: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    out: Path | None = None,
    report: Report = silent,
    cache: Path | None = None,
) -> str:
    """Measure, write the numbers to `out` if given, and say them in a line.

    Raises:
        UsageError: the kind, the data, a field or the target is wrong.
    """
    if kind not in KINDS:
        raise UsageError(f"the kind of evaluation is {kind!r}; {nearest(kind, KINDS)}")
    examples = read_examples(data, samples=samples)
    found = find_fields(examples, fields or (), data)
    model, tokenizer, own_template, own_length = load_any(target, cache=cache)
    template, length = template or own_template, length or (own_length if kind == "perplexity" else ANSWER)
    engine = Engine("single")
    model.to(engine.device)
    if kind == "perplexity":
        from .loop import Loop

        rows = tokenise(examples, tokenizer, fields=found, template=template, length=length)
        loss = Loop(model, engine, size=8, padding=tokenizer.pad_token_id).mean_loss(
            rows, lambda fraction: report("evaluating", fraction, f"{len(rows)} examples")
        )
        numbers: dict[str, Any] = {"loss": loss, "perplexity": perplexity(loss), "examples": len(rows)}
        said = f"perplexity {numbers['perplexity']:.3f} (mean loss {loss:.4f} per token, {len(rows)} examples)"
    else:
        if len(found) != 2:
            raise UsageError(f"exact_match needs a question and an answer; {data} was read as {', '.join(found)}")
        answers = exact_match(
            model,
            tokenizer,
            examples,
            fields=(found[0], found[1]),
            template=template,
            max_new_tokens=length,
            tick=lambda fraction: report("answering", fraction, f"{len(examples)} questions"),
        )
        right = sum(match.found == match.needed for match in answers)
        numbers = {"exact_match": right / len(answers), "right": right, "examples": len(answers)}
        numbers["answers"] = [match._asdict() for match in answers]
        said = f"exact match {100 * right / len(answers):.1f} % ({right} of {len(answers)})"
    how = {"template": template if len(found) == 2 else None, "length": length}
    if out is not None:
        write_atomically(out, json.dumps({"target": target, "data": data, "kind": kind, **how, **numbers}, indent=1))
    prompt = f"template {template!r}" if len(found) == 2 else f"plain text of the field {found[0]!r}"
    return f"{said}; {prompt}, {length} tokens of {'a row' if kind == 'perplexity' else 'an answer'}"
