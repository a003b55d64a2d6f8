"""Models and data by hub ids: the commands against a stand-in for the hub on this machine, its cache, and what it lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("peft")

CONFIGURATIONS = """---
configs:
- {config_name: plain, data_files: train.jsonl}
- {config_name: worded, data_files: train.jsonl}
---
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama):
    """The data sets of the hub, and what full_hub_commands.py leaves."""
    out = tmp_path_factory.mktemp("hub")
    sums = [{"question": f"{a} + {b} = ?", "answer": f"{a} and {b} make {a + b}. #### {a + b}"} for a in range(8) for b in range(8)]
    for name, examples in (("sums/train", sums), ("sums/test", [{"question": "?", "answer": "not to be trained on"}]), ("two/train", sums)):
        path = out / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    (out / "two" / "README.md").write_text(CONFIGURATIONS)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(out / "home"), "no_proxy": "*"}
    for scenario in ("online", "offline"):
        command = [sys.executable, Path(__file__).with_name("full_hub_commands.py"), out, tiny_llama, scenario]
        done = subprocess.run(command, env=own, cwd=out, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def came(folder):
    """What came of each command."""
    return {**json.loads((folder / "online.json").read_text()), **json.loads((folder / "offline.json").read_text())}


@pytest.mark.parametrize("name", ["online", "offline", "gone"])
def test_a_run_by_hub_ids_is_the_run_by_files(folder, came, name):
    """From the hub, and then from the cache alone: HF_HUB_OFFLINE set, or the hub gone."""
    assert came[name]["code"] == came["local"]["code"] == 0, came[name]
    hub, local = (json.loads((folder / run / "report.json").read_text()) for run in (name, "local"))
    assert (hub["run"]["model"], hub["run"]["data"]) == ("org/tiny", "org/sums")
    for key in ("loss_before", "loss_after", "tokens", "parameters"):
        assert hub[key] == local[key], key
    assert hub["loss_after"] < hub["loss_before"]
    fetched = [path.rpartition("/")[2] for method, path in came[name]["asked"] if method == "GET" and "/resolve/" in path]
    assert ({"model.safetensors", "tokenizer.json", "train.jsonl"} <= set(fetched)) == (name == "online")
    assert "examples/s" not in came[name]["stderr"]  # the library's own progress


def test_offline_asks_for_nothing(came):
    assert not any(came[name]["asked"] for name in came if name.startswith("offline"))


@pytest.mark.parametrize("what", ["model", "data"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("online", "not a valid model identifier|doesn't exist on the Hub"),
        ("offline", "HF_HUB_OFFLINE is set, and the hub's cache here lacks it"),
        ("gone", "the hub cannot be reached, and the hub's cache here lacks it"),
    ],
)
def test_an_id_that_there_is_not(came, name, said, what):
    """One line, code 3, at once."""
    found = came[f"{name}, no {what}"]
    assert (found["code"], found["raised"]) == (3, "SystemExit")
    [line] = [line for line in found["stderr"].splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert "'org/none'" in line
    assert any(part in line for part in said.split("|")), line
    assert found["seconds"] < 10  # retries would take half a minute


def test_a_data_set_with_several_configurations_is_refused_with_their_names(came):
    found = came["two configurations"]
    assert found["code"] == 3
    [line] = [line for line in found["stderr"].splitlines() if line.strip()]
    assert "plain" in line
    assert "worded" in line


def test_a_plan_reads_the_config_alone(came):
    assert came["plan"]["code"] == 0
    assert "Memory of lora on org/tiny" in came["plan"]["stdout"]
    assert not any(path.endswith(("model.safetensors", "tokenizer.json")) for _, path in came["plan"]["asked"])


def test_exact_match_of_a_hub_model_on_hub_data(folder, came):
    assert came["eval"]["code"] == 0
    found = json.loads((folder / "eval.json").read_text())
    assert (found["target"], found["data"], found["examples"]) == ("org/tiny", "org/sums", 8)
    assert [answer["needed"] for answer in found["answers"]] == [str(b) for b in range(8)]
