"""Check an implementation of LoRA against exported vectors, with NumPy alone: python read_vectors.py vectors/lora.json"""

import json
import pathlib
import struct
import sys

import numpy as np


def read_safetensors(path):
    """Eight bytes of header length, the header as JSON, then the tensors' bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kinds = {"F64": np.float64, "BOOL": np.bool_, "I64": np.int64}
    return {k: np.frombuffer(data[slice(*v["data_offsets"])], kinds[v["dtype"]]).reshape(v["shape"]) for k, v in header.items()}


def merge(W0, A, B, scaling):
    return W0 + scaling * (B @ A)


mine = {"merge": merge}  # the functions that you have, by the names of the manifest
compare = {
    "itself": lambda part: part,
    "transpose times itself": lambda part: part.T @ part,
    "itself times transpose": lambda part: part @ part.T,
}

manifest_path = pathlib.Path(sys.argv[1])
manifest = json.loads(manifest_path.read_text())
tensors = read_safetensors(manifest_path.parent / manifest["tensors"])
passed, failed = 0, []
for vector in (v for v in manifest["vectors"] if v["function"] in mine):
    i = vector["index"]
    result = mine[vector["function"]](**{name: tensors[f"{i}.argument.{name}"] for name in vector["arrays"]}, **vector["numbers"])
    part = result if vector["part"] == "result" else result[vector["part"]]
    error = np.abs(compare[vector["compare"]](part) - tensors[f"{i}.expected"])
    if np.all(error <= tensors[f"{i}.tolerance"] * 2.0**-52):
        passed += 1
    else:
        failed.append(f"{vector['law']}: {vector['says']}")
print(f"{passed} passed, {len(failed)} failed", *sorted(set(failed)), sep="\n")
