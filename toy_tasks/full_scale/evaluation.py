"""What a model can do: its loss on tokens, exact match of generated answers, and text to read. (`loop` has the mean loss.)"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import UsageError
from .data import IGNORED, Example

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross-entropies of the tokens to learn, each predicted from what stands before it, in at least float32."""
    # The labels are shifted and not the logits, of which a part would be a copy
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="sum")


def count_tokens(labels: Tensor) -> int:
    """How many tokens of a batch are to be learnt."""
    return int((labels[:, 1:] != IGNORED).sum())


def perplexity(loss: float) -> float:
    """exp of a mean loss; infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def extract_answer(text: str) -> str | None:
    """The answer in a solution: the number after the last "####", or else the last number; without commas, dollars and a
    fraction that is zero. None if there is no number."""
    _, mark, after = text.rpartition("####")
    found = NUMBER.findall(after if mark else text)
    if not found:
        return None
    number = (found[0] if mark else found[-1]).replace(",", "").replace("$", "")
    return re.sub(r"\.0*$|(\.\d*?)0+$", r"\1", number)


class Match(NamedTuple):
    """One question: the answer that was needed, the one found in the generated text, and that text."""

    needed: str
    found: str | None
    text: str


def exact_match(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    fields: tuple[str, str],
    template: str,
    max_new_tokens: int = 256,
    size: int = 8,
    tick: Callable[[float], None] | None = None,
) -> list[Match]:
    """Greedy answers to questions, compared by `extract_answer`. A text ends where the model would ask the next question.

    Raises:
        UsageError: an example has no number in its answer.
    """
    needed = [extract_answer(example[fields[1]]) for example in examples]
    for number, (answer, example) in enumerate(zip(needed, examples, strict=True), start=1):
        if answer is None:
            raise UsageError(f"example {number} has no number in its {fields[1]!r}: {example[fields[1]][:60]!r}")
    matches: list[Match] = []
    for start in range(0, len(examples), size):
        prompts = [template.replace("{instruction}", example[fields[0]]) for example in examples[start : start + size]]
        for text in generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens):
            text = text.split(template.split("{instruction}")[0].strip() or "\n\n\n")[0]
            matches.append(Match(str(needed[len(matches)]), extract_answer(text), text))
        if tick:
            tick(len(matches) / len(examples))
    return matches


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """The greedy continuation of each prompt, without the prompt."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    tokenizer.padding_side = side
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # every token is another shape
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    model.train(was_training)
    texts: list[str] = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return texts
