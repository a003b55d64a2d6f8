"""Training and evaluation by transformers' `Trainer`, and what it has to be told: the loss, the order of the rows, what a step is.

It is told so by what it offers for that: methods to override, a loss function, callbacks. Two parts of it are not used. What
it puts into a checkpoint are pickles, in a folder that has its final name before it is whole: it says when there is one, and
`checkpoints` writes it, in safetensors. Its collators refuse packed rows, or let the examples in them see each other
(`data.collate` does neither).
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..config import UsageError
from .data import IGNORED, Order, Row, collate
from .engine import Engine
from .evaluation import token_losses
from .settings import Run


class Arguments(TrainingArguments):
    """The library's settings, where it would choose otherwise."""

    n_gpu = property(lambda self: 1)  # else one process that sees several GPUs gets `nn.DataParallel`
    place_model_on_device = property(lambda self: False)  # the model is there, and where it is sharded it cannot be moved
    should_save = property(lambda self: False)  # no files of its own


class Loop(Trainer):
    """A model and batches of `size` rows, filled up with the token `padding`, for evaluation; `Training` also trains."""

    def __init__(
        self, model: nn.Module, engine: Engine, *, size: int, padding: int, settings: Mapping[str, Any] = MappingProxyType({}), **more: Any
    ) -> None:
        arguments = Arguments(
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            max_grad_norm=0.0,  # no clipping
            use_cpu=engine.device.type == "cpu",
            ddp_broadcast_buffers=False,  # every rank holds the same ones from the start
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            save_only_model=True,  # which is what `save_model` writes, optimizer and all; the rest would be pickles
            **{"output_dir": ".", "save_strategy": "no", **settings},
        )
        arguments.mixed_precision = "no"  # whatever accelerate was started with: the run's precision is that of its weights
        filled = functools.partial(collate, padding=padding)
        super().__init__(model, arguments, data_collator=filled, compute_metrics=mean_over_tokens, **more)
        self.remove_callback(PrinterCallback)
        # What `Engine.shard` has sharded is to it as if transformers' own loading had (with `config.distributed_config`): DDP is
        # left out, and the gradients of what is whole beside it, the adapters, are averaged by Trainer, once in a step
        self.is_distributed_loading_by_transformers = engine.kind == "fsdp"

    def mean_loss(self, rows: Sequence[Row], tick: Callable[[float], None] = lambda fraction: None) -> float:
        """The mean loss per learnt token over all rows, of which each rank reads its part. Its exponential is the perplexity.

        `tick(fraction done)` is called after each batch.

        Raises:
            UsageError: there is no token to predict.
        """
        batches = Batches(tick)
        self.add_callback(batches)
        with torch.compiler.set_stance("force_eager"):  # the batches' shapes are others than in training
            loss: float = self.evaluate(rows)["eval_loss"]  # type: ignore[arg-type]  # a list does for a data set
        self.remove_callback(batches)
        return loss

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """No loss, in the place of the logits the sum of the losses of each row's tokens, and the labels: see `mean_over_tokens`."""
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        # Each row as a batch of its own
        return None, torch.stack([token_losses(*row) for row in zip(logits[:, None], labels[:, None], strict=True)]), labels


def mean_over_tokens(found: EvalPrediction) -> dict[str, float]:
    """From the losses of rows that of a token. (The library's own is the mean of the batches' means.)"""
    labels, sums = np.asarray(found.label_ids), np.asarray(found.predictions, dtype=np.float64)
    count = int((labels[:, 1:] != IGNORED).sum())
    if count == 0:
        raise UsageError("the held-out data has no token to predict")
    return {"loss": float(sums.sum()) / count}


class Batches(TrainerCallback):
    """Counts the batches of an evaluation."""

    def __init__(self, tick: Callable[[float], None]) -> None:
        self.tick, self.done = tick, 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **rest: Any) -> None:
        """Tell of the batch."""
        self.done += 1
        self.tick(self.done / len(eval_dataloader))


class Training(Loop):
    """Train from step `first` on. `before_steps()` is called once all is set up, `after_step(steps done, loss, learnt tokens)`
    after each step, `save(out / "checkpoint-STEP", steps done)` after every `save_every` of them and after the last.

    What is to be evaluated before training is evaluated in `before_steps`, and not before `train`: accelerate would then take the
    model for one that DDP has wrapped already, and gradients would not be averaged.

    The loss of a step is the sum over the tokens of all ranks and micro-batches, divided by their number. Random numbers
    (of dropout) are seeded by step and rank, so that a resumed run draws what the unbroken one does.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        model: nn.Module,
        rows: Sequence[Row],
        *,
        padding: int,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        steps: int,
        first: int = 0,
        before_steps: Callable[[], None] = lambda: None,
        after_step: Callable[[int, float, int], None],
        out: Path = Path(),
        save_every: int = 1,
        save: Callable[[Path, int], None] = lambda folder, step: None,
    ) -> None:
        size = run.rows_at_once(engine.ranks)
        self.rows, self.save = rows, save
        self.order = Order(
            len(rows),
            batch_size=run.batch_size,
            micro_batch=size,
            steps=steps,
            seed=run.seed,
            first=first,
            rank=engine.rank,
            ranks=engine.ranks,
        )
        own = Steps(run, engine, first, before_steps, after_step)
        super().__init__(
            model,
            engine,
            size=size,
            padding=padding,
            settings={
                "max_steps": steps,
                "gradient_accumulation_steps": self.order.accumulation,
                "output_dir": str(out),
                "save_strategy": "steps",
                "save_steps": save_every,
            },
            optimizers=(optimizer, scheduler),
            compute_loss_func=own.share_of_loss,
            callbacks=[own],
        )
        if run.compile:
            model.compile()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches in our order, which depends on seed and step alone."""
        return DataLoader(self.rows, batch_sampler=self.order, collate_fn=self.data_collator)  # type: ignore[arg-type]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint: every rank is here."""
        assert output_dir is not None
        self.save(Path(output_dir), self.state.global_step)

    def train(self, *given: Any, **named: Any) -> Any:
        """Nothing, if all steps are done; see `Trainer.train`."""
        with warnings.catch_warnings():
            # Its successor is not there in older versions of torch, and accelerate does not know it
            warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
            return super().train(*given, **named) if len(self.order) else None


class Steps(TrainerCallback):
    """The loss of a step, and what stands before and after it."""

    def __init__(
        self, run: Run, engine: Engine, first: int, before_steps: Callable[[], None], after_step: Callable[[int, float, int], None]
    ) -> None:
        self.run, self.engine, self.first = run, engine, first
        self.before_steps, self.after_step = before_steps, after_step
        self.loss, self.count = torch.zeros(()), torch.zeros(())

    def share_of_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        """What a micro-batch adds to the loss of the step. `num_items_in_batch` counts the tokens to learn of all ranks.

        Trainer multiplies it by the number of ranks before the backward pass, since the engines average gradients over them.
        """
        share = token_losses(outputs.logits, labels) / num_items_in_batch
        self.loss, self.count = self.loss + share.detach(), num_items_in_batch
        return share

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Count on from the steps that are done."""
        state.global_step = self.first
        self.before_steps()

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Seed what the step draws."""
        torch.manual_seed((self.run.seed * 1_000_003 + state.global_step) * 1009 + self.engine.rank)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.engine.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Tell of the step."""
        self.after_step(state.global_step, self.engine.sum(float(self.loss)), int(self.count))
