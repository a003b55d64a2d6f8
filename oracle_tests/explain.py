"""The text of a failure: the law, the smallest case, the worst entry, and a program that reproduces it without loracle."""

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import round_to
from .law import Law
from .loading import Breach, ContractBroken, Implementation

LONG = 1000  # entries; so many times the same number are written as one


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
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "of":
            names = [str(name.value) for name in node.args[1:] if isinstance(name, ast.Constant)]
            used |= set(names)
            reads |= {id(node.args[0])} if len(names) == len(node.args) - 1 else set()
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
    head = [f"# {law.id}: {law.says}", "from __future__ import annotations", "", *(f"import {name}" for name in sorted(imports))]
    return "\n".join([*head, *_import_lines(impl), "", body])


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
            "    got, want = np.asarray(got, float), np.asarray(want, float)",
            "    assert got.shape == want.shape, f'{what} has shape {got.shape}, expected {want.shape}'",
            "    error = np.abs(got - want)",
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
    """The source of a function (without decorators) or class, after that of every helper, constant and module that it reads."""
    source = textwrap.dedent(inspect.getsource(function))
    definition = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    definition.decorator_list = []
    namespace = vars(sys.modules[function.__module__])
    # In the tree, not in the code: the names in a lambda or a comprehension count too
    nodes = [node for node in ast.walk(definition) if isinstance(node, ast.Name)]
    own = {node.id for node in nodes if isinstance(node.ctx, ast.Store)} | {a.arg for a in ast.walk(definition) if isinstance(a, ast.arg)}
    for name in dict.fromkeys(node.id for node in nodes if node.id in namespace and node.id not in own):
        value = namespace[name]
        if name in ("assert_close", "np", function.__name__) or name in sources:
            continue
        if inspect.ismodule(value):
            sources[name] = f"import {value.__name__} as {name}"
        elif isinstance(value, int | float | str | tuple | np.ndarray) and not isinstance(value, type):
            sources[name] = f"{name} = {literal(value)}"
        elif getattr(value, "__module__", "").startswith(__package__) and (inspect.isfunction(value) or inspect.isclass(value)):
            sources[name] = ""  # who reads itself through another
            _gather(value, sources)
            sources[name] = sources.pop(name)  # after what it reads
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
        "    if isinstance(value, list | tuple):",
        "        return [send('', part) for part in value]",
        "    if callable(value):",
        "        return lambda *given: send('', value(*(receive('', part) for part in given)))",
        "    if not isinstance(value, np.ndarray):",
        "        return value",
        "    return " + _as_array("value", impl, floating='value.dtype.kind == "f"'),
        "",
        "",
        "def receive(name, value):",
        "    if isinstance(value, dict):",
        "        value = [value[part] for part in Parts.names[name]]",
        "    if isinstance(value, tuple | list):",
        "        return Parts(name, [receive('', part) for part in value])",
        "    if hasattr(value, 'detach'):",
        "        value = value.detach().cpu().double().numpy() if value.is_floating_point() else value.cpu().numpy()",
        "    if not hasattr(value, 'dtype'):",
        "        return value",
        "    value = np.asarray(value)",
        "    return value.astype(float) if value.dtype.kind in 'fV' else value",
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
        "    def _asdict(self):",
        "        return dict(vars(self))",
        "",
        "    _fields = property(lambda self: tuple(vars(self)))",
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
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument('', part, impl) for part in value)}]"
    return literal(value)


def _as_array(expression: str, impl: Implementation, floating: str | bool) -> str:
    """Code that makes an array of the implementation of a NumPy expression."""
    space = {"torch": "torch", "numpy": "np", "jax": "jnp"}[impl.arrays]
    dtype = (
        f"{space}.{impl.dtype}" if floating is True else "None" if floating is False else f"{space}.{impl.dtype} if {floating} else None"
    )
    if impl.arrays == "torch":
        return f"torch.tensor({expression}, dtype={dtype}, device={impl.device!r})"
    return f"{space}.asarray({expression}, dtype={dtype})"


def literal(value: Any, dtype: str = "float64") -> str:
    """Code for a value; a float array is written as the implementation received it."""
    if isinstance(value, np.ndarray):
        if value.size > LONG and value.dtype.kind == "f" and np.all(value == value.flat[0]):
            return f"np.full({value.shape!r}, {round_to(value.flat[:1], dtype).item()!r})"
        entries = re.sub(r"\b(nan|inf)\b", r"np.\1", repr(round_to(value, dtype).tolist()))
        shape = f".reshape{value.shape!r}" if value.size == 0 else ""  # a list of no lists does not say how many columns
        return f"np.array({entries}{'' if value.dtype.kind == 'f' else f', {value.dtype.name!r}'}){shape}"
    if type(value) in (list, tuple):
        parts = ", ".join(literal(part, dtype) for part in value)
        return f"[{parts}]" if isinstance(value, list) else f"({parts}{',' * (len(value) == 1)})"
    return repr(value)


def _import_lines(impl: Implementation) -> list[str]:
    """How a program gets at the implementation under the name `mine`."""
    if not impl.by_name:
        return ["mine = ...  # put your implementation here: the module or object that was checked"]
    place, _, attribute = impl.name.partition(":") if not Path(impl.name).exists() else (impl.name, "", "")
    if place.endswith(".py"):
        path = Path(place).resolve()
        lines = ["import importlib.util", "import sys", "", f"sys.path.insert(0, {str(path.parent)!r})"]
        lines += [f"spec = importlib.util.spec_from_file_location('mine', {str(path)!r})"]
        lines += ["mine = sys.modules['mine'] = importlib.util.module_from_spec(spec)", "spec.loader.exec_module(mine)"]
    else:
        lines = [f"import {place} as mine"]
    return [*lines, *([f"mine = mine.{attribute}"] if attribute else [])]
