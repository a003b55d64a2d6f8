"""Check LoRA against vectors with NumPy alone: python read_vectors.py vectors/lora.json"""

import json
import pathlib
import struct
import sys

import numpy as np

KINDS = {"F64": np.float64, "BOOL": np.bool_, "I64": np.int64}


def read_safetensors(path):
    """Eight bytes of header length, the header as JSON, then the tensors' bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    pieces = {k: (data[slice(*v["data_offsets"])], v["dtype"]) for k, v in header.items()}
    return {
        k: np.frombuffer(b, KINDS[d]).reshape(header[k]["shape"])
        for k, (b, d) in pieces.items()
    }


def merge(W0, A, B, scaling):
    return W0 + scaling * (B @ A)


mine = {"merge": merge}  # the functions that you have, by the names of the manifest
compare = {
    "itself": lambda part: part,
    "transpose times itself": lambda part: part.T @ part,
    "itself times transpose": lambda part: part @ part.T,
}

path = pathlib.Path(sys.argv[1])
manifest = json.loads(path.read_text())
tensors = read_safetensors(path.parent / manifest["tensors"])
passed, failed = 0, []
for vector in (v for v in manifest["vectors"] if v["function"] in mine):
    i, part = vector["index"], vector["part"]
    arrays = {name: tensors[f"{i}.argument.{name}"] for name in vector["arrays"]}
    result = mine[vector["function"]](**arrays, **vector["numbers"])
    seen = compare[vector["compare"]](result if part == "result" else result[part])
    if np.all(np.abs(seen - tensors[f"{i}.expected"]) <= tensors[f"{i}.tolerance"] * 2.0**-52):
        passed += 1
    else:
        failed.append(f"{vector['law']}: {vector['says']}")
print(f"{passed} passed, {len(failed)} failed", *sorted(set(failed)), sep="\n")
