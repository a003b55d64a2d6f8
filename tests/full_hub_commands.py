"""Run by test_full_hub.py: `full_hub_commands.py OUT MODEL online|offline` gives the commands that need a hub to a stand-in for
it, whose address has to be known before the hub's libraries are imported, and writes what came of each."""

import json
import os
import sys
import time
from pathlib import Path

from hub_stand_in import hub

out, model, scenario = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
SETTINGS = ["precision=float32", "batch_size=4", "rank=2", "lr=1e-2", "sequence_length=40", "dropout=0"]
RUN = ["run", "lora", "--cpu", "--steps", "3", *[word for setting in SETTINGS for word in ("--set", setting)]]
came = {}
sets = {("datasets", f"org/{name}"): out / name for name in ("sums", "two")}


def command(name, *words):
    from typer.testing import CliRunner

    from loracle.cli import app

    asked.clear()
    began = time.monotonic()
    found = CliRunner().invoke(app, ["full", *words])
    kind = type(found.exception).__name__ if found.exception else None
    came[name] = {"code": found.exit_code, "raised": kind, "stdout": found.stdout, "stderr": found.stderr}
    came[name] |= {"asked": list(asked), "seconds": time.monotonic() - began}


def run(name, model, data):
    command(name, *RUN, "--model", model, "--data", str(data), "--out", str(out / name))


with hub({("models", "org/tiny"): model, **sets}) as (address, asked):
    os.environ["HF_ENDPOINT"] = address
    if scenario == "offline":
        os.environ["HF_HUB_OFFLINE"] = "1"
    run(scenario, "org/tiny", "org/sums")
    run(f"{scenario}, no model", "org/none", "org/sums")
    run(f"{scenario}, no data", "org/tiny", "org/none")
    if scenario == "online":
        run("local", model, out / "sums" / "train.jsonl")
        run("two configurations", "org/tiny", "org/two")
        command("plan", "plan", "lora", "--model", "org/tiny", "--memory", "8")
        numbers = ("--out", str(out / "eval.json"), "--samples", "8", "--length", "8")
        command("eval", "eval", "org/tiny", "--data", "org/sums", "--kind", "exact_match", *numbers)
if scenario == "online":
    from loracle.toy_tasks.full_scale.hub import reachable

    reachable.cache_clear()  # as a process would that is started now
    run("gone", "org/tiny", "org/sums")
    run("gone, no model", "org/none", "org/sums")
    run("gone, no data", "org/tiny", "org/none")
(out / f"{scenario}.json").write_text(json.dumps(came))
