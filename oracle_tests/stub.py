"""The stub that `loracle adapter PAPER` prints: every function of a contract, to be filled in or deleted."""

import inspect
import textwrap

from .contract import Function, check_paper, contract
from .law import laws_of

HEAD = '''"""My implementation of {paper}, for `loracle check {file}.py --paper {paper}`.

Fill in what you have and delete the rest: what is absent reads "missing". Functions are called by keyword with arrays of
the kind that LORACLE names, and return new arrays of the same dtype. Parameters with a default may be left out too.
"""

LORACLE = {{"arrays": "torch", "dtype": "float64"}}  # also: "device", "generator" (torch, numpy, jax, seed), "tolerance"
'''


def stub(paper: str) -> str:
    """The text of the stub. Raises UsageError if there is no such paper."""
    parts = [HEAD.format(paper=check_paper(paper), file="my_adapter")]
    return "\n\n".join([*parts, *(_function(paper, function) for function in contract(paper).values())]) + "\n"


def _function(paper: str, function: Function) -> str:
    parameters, star = [], False
    for p in function.signature.parameters.values():
        if p.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            parameters.append("*")
            star = True
        parameters.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    needed_by = [law.id for law in laws_of(paper) if any(need.partition(".")[0] == function.name for need in law.needs)]
    shapes = [f"{s.name}: {_kind(s.dims, s.dtype)}" for s in function.parameters.values()]
    returns = ", ".join(f"{'' if s.name == 'result' else s.name + ' '}{_kind(s.dims, s.dtype)}" for s in function.returns)
    text = "\n".join([function.doc.splitlines()[0], "", *shapes, "", f"Returns: {returns}", f"Laws: {', '.join(needed_by) or 'none'}"])
    body = f'    """{textwrap.indent(text, "    ").strip()}\n    """'
    message = f'    raise NotImplementedError("fill in or delete {function.name}")'
    return f"def {function.name}({', '.join(parameters)}):\n{body}\n{message}\n".rstrip("\n")


def _kind(dims: str | None, dtype: str) -> str:
    if dims is None:
        return dtype
    return f"({', '.join(dims.split())})" + ("" if dtype == "Float" else f" {dtype.lower()}")
