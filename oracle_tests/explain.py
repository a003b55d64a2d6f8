"""The text of a failure: the law, the smallest case, the worst entry, and a program that reproduces it without loracle."""

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import round_to
from .law import Law
from .loading import Breach, ContractBroken, Implementation


def explain(law: Law, impl: Implementation | None, case: Any, error: BaseException) -> str:
    """Everything that a reader needs to understand a failure of `law` on `case`."""
    if impl is None or case is None:
        return f"{law.id} fails: {law.says}\n{error}"
    program = snippet(law, impl, case, error)
    diagnosis = _diagnosis(law, impl, error)  # last, since it has a time limit of its own
    parts = [
        f"{law.id} fails for {impl.name}: {law.says}",
        f"  formula    {law.formula}",
        f"  input      {_shapes(law, case)}  (the smallest found)",
        f"  what came  {_what(error)}",
        *([f"  diagnosis  {diagnosis}"] if diagnosis else []),
        f"  read more  the tutorial page papers/{law.paper}, law {law.id}",
        "",
        "To reproduce it, run this program; it does not need loracle:",
        "",
        textwrap.indent(program, "    "),
    ]
    return "\n".join(parts)


def _diagnosis(law: Law, impl: Implementation, error: BaseException) -> str:
    """What the implementer did wrong, if it can be told; nothing where the message says it already."""
    if isinstance(error, TimeoutError):
        return ""
    from .diagnosis import describe

    said = describe(impl, law)
    return "" if isinstance(error, ContractBroken) and said.startswith("no ") else said


def _what(error: BaseException) -> str:
    text = str(error).strip()
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


def _shapes(law: Law, case: Any) -> str:
    """The fields of the case that the law reads: shapes of arrays, values of numbers."""
    used = _used_fields(law, case)
    return ", ".join(f"{k} {np.shape(v)}" if isinstance(v, np.ndarray) else f"{k} = {v!r}" for k, v in case._asdict().items() if k in used)


def _used_fields(law: Law, case: Any) -> set[str]:
    """The names that the law's body reads off `case`; all of them if it hands the whole case on."""
    used, whole = set(), False
    tree = ast.parse(textwrap.dedent(inspect.getsource(law.body)))
    reads = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "case":
            used.add(node.attr)
        whole |= isinstance(node, ast.Name) and node.id == "case" and id(node) not in reads
    return set(case._fields) if whole else used


# The program


def snippet(law: Law, impl: Implementation, case: Any, error: BaseException) -> str:
    """A program of NumPy and the user's own module that fails as the law does, and ends well once the fault is mended."""
    if isinstance(error, ContractBroken):
        breach = error.breach
        body = _breach_program(impl, breach)
        imports = ["numpy as np", *(["contextlib", "io"] if breach.kind == "printed" else [])]
    else:
        body, imports = _law_program(law, impl, case), ["numpy as np"]
    if impl.arrays == "torch" and "torch." in body:
        imports.append("torch")
    if impl.arrays == "jax":
        imports += ["jax", "jax.numpy as jnp"]
        body = ('jax.config.update("jax_enable_x64", True)\n' if impl.dtype == "float64" else "") + body
    return "\n".join([f"# {law.id}: {law.says}", *(f"import {name}" for name in sorted(imports)), *_import_lines(impl), "", body])


def _law_program(law: Law, impl: Implementation, case: Any) -> str:
    sources: dict[str, str] = {}
    _gather(law.body, sources)
    derived = {n: d for n, d in impl.derivations.items() if n in impl.derived}
    for derivation in derived.values():
        _gather(derivation.compute, sources)
    used = _used_fields(law, case)
    # A helper that is handed the whole case may read any field of it
    fields = [f"    {k} = {literal(v, impl.dtype)}" for k, v in case._asdict().items() if k in used]
    return "\n".join(
        [
            "class case:  # the smallest input found",
            *fields,
            "",
            "",
            "\n\n\n".join(sources.values()),
            "",
            "",
            "# How a law calls and compares",
            "",
            "",
            "def assert_close(got, want, *, size=1.0, conditioning=1.0, within=None, what='the result'):",
            f"    tolerance = {law.tolerance * impl.eps * impl.tolerance_factor!r} * conditioning * size if within is None else within",
            "    error = np.abs(np.asarray(got, float) - np.asarray(want, float))",
            "    assert np.all(error <= tolerance), f'{what}: {got} is not {want}, off by {np.max(error)}'",
            "",
            "",
            *_calling_lines(impl, derived),
            "",
            f"{law.body.__name__}(implementation, case)",
            f'print("{law.id} holds on this input")',
        ]
    )


def _gather(function: Any, sources: dict[str, str]) -> None:
    """The source of `function` without decorators, after that of every helper and constant that it reads."""
    names = inspect.getclosurevars(function).globals
    for name, value in names.items():
        if name in ("assert_close", "np") or name in sources:
            continue
        if inspect.isfunction(value) and value.__module__.startswith(function.__module__.rpartition(".")[0]):
            _gather(value, sources)
        elif isinstance(value, int | float | str | tuple):
            sources[name] = f"{name} = {value!r}"
    source = textwrap.dedent(inspect.getsource(function))
    definition = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    sources[function.__name__] = "\n".join(source.splitlines()[definition.lineno - 1 :]).rstrip()


def _calling_lines(impl: Implementation, derived: dict[str, Any]) -> list[str]:
    """A stand-in for the oracle's caller: keywords in, NumPy out."""
    lines = [
        "class Implementation:",
        "    def __getattr__(self, name):",
        "        return lambda **given: receive(name, getattr(mine, name)(**{k: send(k, v) for k, v in given.items()}))",
        "",
        "",
        "def send(name, value):",
    ]
    if "generator" in {p for f in impl.contract.values() for p in f.parameters}:
        made = {
            "torch": f"torch.Generator({impl.device!r}).manual_seed(value)",
            "numpy": "np.random.default_rng(value)",
            "jax": "jax.random.key(value)",
            "seed": "value",
        }[impl.generator]
        lines += ["    if name == 'generator':", f"        return {made}"]
    lines += [
        "    if not isinstance(value, np.ndarray):",
        "        return value",
        "    return " + _as_array("value", impl, floating='value.dtype.kind == "f"'),
        "",
        "",
        "def receive(name, value):",
        "    if isinstance(value, dict):",
        "        value = tuple(value.values())",
        "    if isinstance(value, tuple | list):",
        "        return Parts(name, [receive('', part) for part in value])",
        "    if hasattr(value, 'detach'):",
        "        value = value.detach().cpu().double().numpy() if value.is_floating_point() else value.cpu().numpy()",
        "    return np.asarray(value, float) if getattr(value, 'dtype', None) is not None and value.dtype != bool else value",
        "",
        "",
        "class Parts(tuple):  # a result in parts, which have names",
        f"    names = { ({n: tuple(p.name for p in f.returns) for n, f in impl.contract.items() if f.result})!r}",
        "",
        "    def __new__(cls, function, parts):",
        "        self = super().__new__(cls, parts)",
        "        vars(self).update(zip(cls.names.get(function, ()), parts))",
        "        return self",
        "",
        "",
        "implementation = Implementation()",
        *(f"implementation.{n} = lambda **given: {d.compute.__name__}(implementation, **given)" for n, d in derived.items()),
    ]
    return lines


def _breach_program(impl: Implementation, breach: Breach) -> str:
    """One call, and an assertion of the part of the contract that it broke."""
    given = [f"{k} = {_argument(k, v, impl)}" for k, v in breach.arguments.items()]
    call = f"mine.{breach.function}({', '.join(f'{k}={k}' for k in breach.arguments)})"
    return "\n".join([*given, *breach.program(call)])


def _argument(name: str, value: Any, impl: Implementation) -> str:
    if name == "generator":
        return {
            "torch": f"torch.Generator({impl.device!r}).manual_seed({value})",
            "numpy": f"np.random.default_rng({value})",
            "jax": f"jax.random.key({value})",
            "seed": repr(value),
        }[impl.generator]
    if isinstance(value, np.ndarray):
        return _as_array(literal(value, impl.dtype), impl, floating=value.dtype.kind == "f")
    return repr(value)


def _as_array(expression: str, impl: Implementation, floating: str | bool) -> str:
    """Code that makes an array of the implementation of a NumPy expression."""
    space = {"torch": "torch", "numpy": "np", "jax": "jnp"}[impl.arrays]
    dtype = (
        f"{space}.{impl.dtype}" if floating is True else "None" if floating is False else f"{space}.{impl.dtype} if {floating} else None"
    )
    if impl.arrays == "torch":
        return f"torch.tensor({expression}, dtype={dtype}, device={impl.device!r})"
    return f"{space}.asarray({expression}, dtype={dtype})"


def literal(value: Any, dtype: str) -> str:
    """Code for a value; a float array is written as the implementation received it."""
    if isinstance(value, np.ndarray):
        return f"np.array({round_to(value, dtype).tolist()!r})"
    return repr(value)


def _import_lines(impl: Implementation) -> list[str]:
    """How a program gets at the implementation under the name `mine`."""
    if not impl.by_name:
        return ["mine = ...  # put your implementation here: the module or object that was checked"]
    place, _, attribute = impl.name.partition(":") if not Path(impl.name).exists() else (impl.name, "", "")
    if place.endswith(".py"):
        path = Path(place).resolve()
        lines = ["import importlib.util", f"spec = importlib.util.spec_from_file_location({path.stem!r}, {str(path)!r})"]
        lines += ["mine = importlib.util.module_from_spec(spec)", "spec.loader.exec_module(mine)"]
    else:
        lines = [f"import {place} as mine"]
    return [*lines, *([f"mine = mine.{attribute}"] if attribute else [])]
