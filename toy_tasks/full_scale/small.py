"""A model, a tokenizer and two domains of text from what ships with Python, so that nothing has to be fetched to try a run.

The old domain is the prose of `pydoc_data.topics`, on which the model is pretrained; the new one is the source of the
standard library's functions: from the first line of a function its body has to be written.
"""

import ast
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import IGNORED, Example, Order, Row, Split, collate

VOCABULARY = 1024
HIDDEN, INTERMEDIATE, LAYERS, HEADS, LENGTH = 96, 256, 3, 3, 128
STEPS, BATCH, LR = 250, 16, 3e-3
MODULES, FUNCTIONS, HELD_OUT = 60, 640, 64
SEED = 0


def build(folder: Path, tick: Callable[[float], None] | None = None) -> None:
    """Train the tokenizer and pretrain the model, about half a minute on one core, and save both in `folder` for transformers."""
    from transformers import LlamaForCausalLM

    tokenizer = train_tokenizer("\n".join(example["text"] for example in old_domain().train))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config())
    pretrain(model, chunks(old_domain().train, tokenizer), tokenizer.pad_token_id, tick)
    # A folder that is there is whole: it gets its name last
    draft = folder.with_name(f".{folder.name}.part")
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    draft.replace(folder)


def config() -> Any:
    """The model's shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=4 * LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def train_tokenizer(text: str) -> Any:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens, as transformers takes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def pretrain(model: nn.Module, rows: list[Row], padding: int, tick: Callable[[float], None] | None) -> None:
    """AdamW on all weights for `STEPS` steps. (`Training` would want the other ranks, which wait meanwhile.)"""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    order = Order(len(rows), batch_size=BATCH, micro_batch=BATCH, steps=STEPS, seed=SEED)
    for step, chosen in enumerate(order):
        optimizer.zero_grad()
        model(**collate([rows[i] for i in chosen], padding), use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        if tick:
            tick((step + 1) / STEPS)


def chunks(examples: list[Example], tokenizer: Any, length: int = LENGTH) -> list[Row]:
    """Texts one after the other, cut into full rows, every token learnt."""
    stream = [token for example in examples for token in [*tokenizer(example["text"]).input_ids, tokenizer.eos_token_id]]
    starts = range(0, len(stream) - length, length)
    return [{"input_ids": stream[i : i + length], "labels": [IGNORED, *stream[i + 1 : i + length]]} for i in starts]


def old_domain() -> Split:
    """The help texts of Python's own documentation; every tenth is held out."""
    from pydoc_data.topics import topics

    texts: list[Example] = [{"text": topics[name]} for name in sorted(topics)]
    return Split(train=[text for i, text in enumerate(texts) if i % 10], held_out=texts[::10])


def new_domain() -> Split:
    """Short functions of the standard library, in an order drawn once: the first line instructs, the rest responds."""
    found: list[Example] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:MODULES]:
        source = path.read_text(encoding="utf-8", errors="ignore")
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno and 4 <= node.end_lineno - node.lineno <= 12:
                found.append({"instruction": lines[node.lineno - 1], "response": "".join(lines[node.lineno : node.end_lineno])})
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(SEED)).tolist()
    chosen = [found[i] for i in order[: FUNCTIONS + HELD_OUT]]
    return Split(train=chosen[:FUNCTIONS], held_out=chosen[FUNCTIONS:])
