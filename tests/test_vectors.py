"""Exported vectors: independent of the implementation, readable without loracle, and able to tell mistakes."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from loracle.oracle_tests.contract import papers
from loracle.oracle_tests.files import write_atomically
from loracle.oracle_tests.loading import load
from loracle.oracle_tests.mistakes import mistakes_of, wrong
from loracle.oracle_tests.vectors import LARGEST, OBSERVABLES, export, vectors_of

READER = Path(__file__).resolve().parents[1] / "tutorials/how-to/read_vectors.py"
BLOCKED = (
    "import sys; sys.modules['loracle'] = sys.modules['torch'] = None; import runpy; sys.argv.pop(0); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.fixture(scope="module", params=papers())
def exported(request, tmp_path_factory):
    return export(request.param, tmp_path_factory.mktemp("vectors"))


def read(manifest_path):
    manifest = json.loads(manifest_path.read_text())
    return manifest, load_file(manifest_path.parent / manifest["tensors"])


def check(manifest, tensors, impl, dtype="float64"):
    """The indices of vectors that `impl` gets wrong."""
    bad = []
    for v in manifest["vectors"]:
        i, draws = v["index"], "generator" in impl.contract[v["function"]].parameters
        arguments = {k: tensors[f"{i}.argument.{k}"] for k in v["arrays"]} | v["numbers"] | ({"generator": 5} if draws else {})
        if "indices.0" in arguments:
            arguments["indices"] = [arguments.pop("indices.0"), arguments.pop("indices.1")]
        try:
            result = impl.call(v["function"], **arguments)
            value = np.asarray(result if v["part"] == "result" else getattr(result, v["part"]), float)
            error = np.abs(OBSERVABLES[v["compare"]](value) - tensors[f"{i}.expected"])
            if np.any(error > tensors[f"{i}.tolerance"] * np.finfo(dtype).eps):
                bad.append(i)
        except Exception:
            bad.append(i)
    return bad


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_reference_passes(exported, dtype):
    manifest, tensors = read(exported)
    assert manifest["schema"] == 1
    assert len(manifest["vectors"]) > 50
    assert check(manifest, tensors, load(f"loracle.reference.{manifest['paper']}", paper=manifest["paper"], dtype=dtype), dtype) == []


def test_no_tensor_is_large(exported):
    assert max(tensor.size for tensor in read(exported)[1].values()) <= LARGEST


def test_each_mistake_is_killed_by_just_the_vectors_that_say_so(exported):
    manifest, tensors = read(exported)
    killed = {name for v in manifest["vectors"] for name in v["kills"]}
    assert killed
    for mistake in mistakes_of(manifest["paper"]):
        if mistake.harmless:
            assert mistake.name not in killed
        else:
            bad = check(manifest, tensors, load(wrong(mistake), paper=manifest["paper"]))
            said = [v["index"] for v in manifest["vectors"] if mistake.name in v["kills"]]
            assert set(said) <= set(bad)
            assert bool(said) == bool(bad)


def test_the_same_files_every_time(exported, tmp_path):
    again = export(exported.stem, tmp_path)
    assert again.read_bytes() == exported.read_bytes()
    assert again.with_suffix(".safetensors").read_bytes() == exported.with_suffix(".safetensors").read_bytes()


def run_reader(script, manifest):
    done = subprocess.run([sys.executable, "-c", BLOCKED, script, manifest], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reader_needs_neither_loracle_nor_torch(exported, tmp_path):
    if exported.stem != "lora":
        pytest.skip("the script has a function of LoRA only")
    text = READER.read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= 40
    assert re.match(r"8 passed, 0 failed\n$", run_reader(READER, exported))
    (tmp_path / "wrong.py").write_text(text.replace("W0 + scaling * (B @ A)", "W0 + B @ A"))
    assert "failed\nlora.L2c" in run_reader(tmp_path / "wrong.py", exported)


def test_expected_values_do_not_come_from_the_reference(monkeypatch):
    before = vectors_of("lora")
    from loracle.reference import lora

    monkeypatch.setattr(lora, "merge", lambda W0, A, B, scaling: W0 + 3 * scaling * (B @ A))
    after = {(v.function, i): v for i, v in enumerate(vectors_of("lora"))}
    for i, vector in enumerate(before):
        np.testing.assert_array_equal(after[vector.function, i].expected, vector.expected)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]
