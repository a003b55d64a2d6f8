"""Arrays in and out of an implementation: NumPy float64 on the oracle's side, NumPy, torch or JAX on the other."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

ARRAYS = ("torch", "numpy", "jax")
GENERATORS = ("torch", "numpy", "jax", "seed")
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """The float64 array nearest to `array` whose entries exist in `dtype`; integers and booleans stay as they are."""
    if array.dtype.kind != "f":
        return array
    if dtype == "bfloat16":  # NumPy has none: keep the upper 16 bits of a float32, rounded to nearest even
        bits = array.astype(np.float32).view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
    return array.astype(dtype).astype(np.float64)


def to_arrays(value: Any, arrays: str, dtype: str, device: str) -> Any:
    """A NumPy array as an array of the implementation; anything else is passed on as it is."""
    if not isinstance(value, np.ndarray):
        return value
    floating = value.dtype.kind == "f"
    if arrays == "numpy":
        return value.astype(dtype) if floating else value.copy()
    if arrays == "jax":
        import jax.numpy as jnp

        return jnp.asarray(value, dtype=dtype if floating else None)
    import torch

    return torch.tensor(value, dtype=getattr(torch, dtype) if floating else None, device=device)


def to_numpy(value: Any) -> np.ndarray:
    """An array of any library as NumPy: float64 if it is floating point, else as it is."""
    if is_torch(value):
        value = value.detach().cpu()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind in "fV" else array  # JAX's bfloat16 reaches NumPy as kind "V"


def is_array(value: Any) -> bool:
    """Whether `value` is an array of one of the known libraries (a NumPy scalar counts)."""
    return is_torch(value) or isinstance(value, np.ndarray | np.generic) or type(value).__module__.startswith(("jax", "jaxlib"))


def is_torch(value: Any) -> bool:
    """Whether `value` is a torch tensor, without importing torch to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def dtype_name(value: Any) -> str:
    """ "float32" for an array of any library."""
    return str(value.dtype).removeprefix("torch.")


def make_generator(seed: int, kind: str, device: str) -> Any:
    """A seeded source of random numbers of the kind that the implementation takes."""
    if kind == "numpy":
        return np.random.default_rng(seed)
    if kind == "jax":
        import jax

        return jax.random.key(seed)
    if kind == "torch":
        import torch

        return torch.Generator(device).manual_seed(seed)
    return seed


@contextlib.contextmanager
def precision(arrays: str, dtype: str) -> Iterator[None]:
    """JAX makes float64 arrays only where that is switched on; the switch is turned back afterwards."""
    if arrays == "jax" and dtype == "float64":
        import jax

        with jax.enable_x64(True):
            yield
    else:
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: on matrices as small as a law's, several only wait for each other, on a busy machine for long."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def random_states() -> dict[str, Any]:
    """The states of the global generators of `random`, NumPy and (where imported) torch, in comparable form."""
    import random

    numpy_state: Any = np.random.get_state(legacy=True)
    states: dict[str, Any] = {"numpy.random": (numpy_state[1].tobytes(), *numpy_state[2:])}
    if "beartype" not in sys.modules:  # which draws from `random` the entry of a list that it checks, in anybody's functions
        states["random"] = random.getstate()
    if torch := sys.modules.get("torch"):
        states["torch"] = torch.get_rng_state().numpy().tobytes()
        if torch.cuda.is_initialized():
            states["torch.cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return states


def advance_random_states() -> None:
    """Draw from the global generators, so that they are in no state that seeding gives (Hypothesis seeds two of them by 0)."""
    import random

    for _ in range(5):
        random.random()
    np.random.random(5)
    if torch := sys.modules.get("torch"):
        torch.rand(5)


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the global generators back to what `random_states` found."""
    import random

    if "random" in states:
        random.setstate(states["random"])
    key, *rest = states["numpy.random"]
    np.random.set_state(("MT19937", np.frombuffer(key, np.uint32), *rest))
    for name, library in (("torch", "torch"), ("torch.cuda", "torch.cuda")):
        if name in states:
            torch = sys.modules["torch"]
            state = torch.frombuffer(bytearray(states[name]), dtype=torch.uint8)
            sys.modules[library].set_rng_state(state)
