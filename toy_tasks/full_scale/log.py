"""A run's log: a line of JSON before the first step and one after each, and what they add up to."""

import json
import math
import time
from pathlib import Path
from typing import Any

from ..config import ToyError
from ..records import write_atomically
from .engine import Engine

LOG = "log.jsonl"


class Log:
    """The log in the run's folder, which the first process writes, and what a run knows of its course.

    `loss` and `old_loss` are the held-out losses before training, `tokens` and `seconds` what the steps took in all, saving left
    out, `setup_seconds` what came before the first of them.
    """

    def __init__(self, out: Path, engine: Engine) -> None:
        self.path, self.engine = out / LOG, engine
        self.loss: float = math.nan
        self.old_loss: float | None = None
        self.tokens, self.seconds, self.setup_seconds = 0, 0.0, 0.0
        self.clock = time.perf_counter()

    def start(self) -> None:
        """Begin an empty log, in a folder that is made. Raises ToyError if it cannot be written."""
        self.engine.wait()
        if self.engine.is_main:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text("")
            except OSError as error:
                raise ToyError(f"{self.path.parent} cannot be written: {error.strerror}") from None

    def resume(self, step: int) -> None:
        """Go on after a step; what the log says of later ones is taken out. Raises ToyError if it cannot be read or written."""
        try:
            lines = [line for line in read_log(self.path.parent) if line["step"] <= step]
            self.loss, self.old_loss = lines[0]["held_out_loss"], lines[0]["old_loss"]
        except (OSError, IndexError):
            raise ToyError(f"{self.path} is missing or not whole. Delete the run's folder to start from the beginning.") from None
        self.engine.wait()
        if self.engine.is_main:
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.engine.wait()
        self.tokens, self.seconds = lines[-1].get("tokens", 0), lines[-1].get("seconds", 0.0)

    def before(self, loss: float, old_loss: float | None) -> None:
        """The held-out losses before the first step."""
        self.loss, self.old_loss = loss, old_loss
        self._append({"step": 0, "held_out_loss": loss, "old_loss": old_loss})

    def first_step(self) -> None:
        """The first step of this process begins."""
        now = time.perf_counter()
        self.setup_seconds, self.clock = now - self.clock, now

    def step(self, step: int, loss: float, lr: float, tokens: int) -> None:
        """A step is done, and the next begins."""
        now = time.perf_counter()
        self.tokens, self.seconds, self.clock = self.tokens + tokens, self.seconds + now - self.clock, now
        self._append({"step": step, "loss": loss, "lr": lr, "tokens": self.tokens, "seconds": round(self.seconds, 3)})

    def saved(self) -> None:
        """The time since the last step was not that of the next."""
        self.clock = time.perf_counter()

    def _append(self, line: dict[str, Any]) -> None:
        if self.engine.is_main:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise ToyError(f"{self.path} could not be written: {error.strerror}. The last checkpoint is untouched.") from None


def read_log(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that was cut off is left out."""
    lines = []
    for text in (out / LOG).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
