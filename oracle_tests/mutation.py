"""Mutants of a reference file: its syntax tree with one small change each, as a slip of the hand would make it.

    tree = ast.parse(source)
    for mutant in mutants_of(tree):
        with mutant.applied():
            code = compile(tree, path, "exec")

Every executable statement of functions, methods and the module takes part, except imports, docstrings, messages (all that
stands in a `raise`, and f-strings), `PAPER`, type annotations and what stands under `__main__`. Two operators that make the
same program make one mutant; none is ever left out because no test could see it.
"""

import ast
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
}
RELAXED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
PRODUCTS = (ast.MatMult, ast.Mult, ast.Div, ast.Pow)
TRANSPOSES = {"T", "mT", "H", "mH"}


@dataclass(frozen=True)
class Mutant:
    """One change. `function` is a qualified name, empty for the module's own code; `before` and `after` are the statement."""

    function: str
    line: int
    operator: str
    before: str
    after: str
    number: int  # 1, or which of several equal statements of the function
    owner: ast.AST
    field: str
    index: int | None
    replacement: ast.AST

    @property
    def unit(self) -> str:
        """The name of the module that the mutant changes: a function, a class, a constant."""
        return self.function.partition(".")[0]

    @property
    def change(self) -> str:
        """What a survivor's reason is filed under, with `function`: it holds no line number, so that it moves with the code."""
        return f"{self.before} -> {self.after}" + (f" (#{self.number})" if self.number > 1 else "")

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the tree is changed."""
        old = _put(self.owner, self.field, self.index, self.replacement)
        try:
            yield
        finally:
            _put(self.owner, self.field, self.index, old)


def _put(owner: ast.AST, field: str, index: int | None, new: ast.AST) -> ast.AST:
    """Set a child of a node and return the one that was there."""
    if index is None:
        old: ast.AST = getattr(owner, field)
        setattr(owner, field, new)
    else:
        children = getattr(owner, field)
        old, children[index] = children[index], new
    return old


# Expressions: each rule yields what may stand in the place of a node

Rule = Callable[[ast.AST, ast.AST], Iterator[ast.expr | ast.operator]]
RULES: list[tuple[str, Rule]] = []


def rule(operator: str) -> Callable[[Rule], Rule]:
    """Register `(node, parent) -> replacements` under the name that reports use."""

    def register(function: Rule) -> Rule:
        RULES.append((operator, function))
        return function

    return register


@rule("swap operands")
def _swap_operands(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Add | ast.Mult):
        yield ast.BinOp(node.right, node.op, node.left)


@rule("drop an operand")
def _drop_operand(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp):
        yield node.left
        yield node.right


@rule("exchange an arithmetic operator")
def _exchange_operator(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)


@rule("exchange an arithmetic operator")
def _exchange_update(node: ast.AST, parent: ast.AST) -> Iterator[ast.operator]:
    if isinstance(parent, ast.AugAssign) and isinstance(node, ast.operator) and type(node) in SWAPPED:
        yield SWAPPED[type(node)]()


@rule("flip a sign")
def _flip_sign(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    # Inside a longer product the sign is flipped once, for the whole
    inner = isinstance(parent, ast.BinOp) and isinstance(parent.op, PRODUCTS)
    if isinstance(node, ast.BinOp) and isinstance(node.op, PRODUCTS) and not inner:
        yield ast.UnaryOp(ast.USub(), node)


@rule("drop a transpose")
def _drop_transpose(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Attribute) and node.attr in TRANSPOSES:
        yield node.value


@rule("drop a call")
def _drop_call(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    """`x.sqrt()` and `inv(x)` become `x`: an inverse, a root, a cast, a copy is forgotten."""
    if isinstance(node, ast.Call) and not isinstance(parent, ast.Expr):
        if isinstance(node.func, ast.Attribute):
            yield node.func.value
        if node.args and not isinstance(node.args[0], ast.Starred):
            yield node.args[0]


@rule("swap arguments")
def _swap_arguments(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in ("min", "max")):
        for i in range(len(node.args) - 1):
            yield ast.Call(node.func, _swapped(node.args, i), node.keywords)


@rule("swap parts of a result")
def _swap_parts(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and isinstance(parent, ast.Return | ast.Assign | ast.IfExp):
        for i in range(len(node.elts) - 1):
            if not _is_choice(node):
                yield ast.Tuple(_swapped(node.elts, i), node.ctx)
    if isinstance(node, ast.Call) and not isinstance(parent, ast.Expr):
        # The parts of a NamedTuple given by keyword, or two options; in a check by itself the order concerns the message only
        for i in range(len(node.keywords) - 1):
            values = _swapped([k.value for k in node.keywords], i)
            yield ast.Call(node.func, node.args, [ast.keyword(k.arg, v) for k, v in zip(node.keywords, values, strict=True)])


def _swapped(items: list[ast.expr], i: int) -> list[ast.expr]:
    return [*items[:i], items[i + 1], items[i], *items[i + 2 :]]


@rule("drop a choice")
def _drop_choice(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if _is_choice(node):
        assert isinstance(node, ast.Tuple)
        for i in range(len(node.elts)):
            yield ast.Tuple([*node.elts[:i], *node.elts[i + 1 :]], node.ctx)


@rule("exchange the dimensions of a shape")
def _reverse_words(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
        yield ast.Constant(" ".join(reversed(node.value.split())))


@rule("shift a constant")
def _shift_constant(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)


@rule("shift a bound of a slice")
def _shift_slice(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Slice):
        if node.lower is not None:
            for bound in _neighbours(node.lower):
                yield ast.Slice(bound, node.upper, node.step)
        if node.upper is not None:
            for bound in _neighbours(node.upper):
                yield ast.Slice(node.lower, bound, node.step)


def _neighbours(bound: ast.expr) -> list[ast.expr]:
    if isinstance(bound, ast.Constant) and isinstance(bound.value, int):
        return [ast.Constant(bound.value + 1), ast.Constant(bound.value - 1)]
    return [ast.BinOp(bound, ast.Add(), ast.Constant(1)), ast.BinOp(bound, ast.Sub(), ast.Constant(1))]


@rule("relax or negate a comparison")
def _relax(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield ast.Compare(node.left, [*node.ops[:i], RELAXED[type(op)](), *node.ops[i + 1 :]], node.comparators)


@rule("change a logical operator")
def _change_logic(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for i in range(len(node.values)):
            rest = [*node.values[:i], *node.values[i + 1 :]]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


@rule("negate a condition")
def _negate(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(parent, ast.If | ast.While | ast.IfExp | ast.Assert) and node is parent.test:
        # `==` and `is` are negated by their own rule, `not` is dropped by that of signs
        exact = isinstance(node, ast.Compare) and len(node.ops) == 1 and not isinstance(node.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE)
        if not exact and not isinstance(node, ast.UnaryOp):
            yield ast.UnaryOp(ast.Not(), parent.test)


@rule("drop a keyword argument")
def _drop_keyword(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Call):
        for i in range(len(node.keywords)):
            yield ast.Call(node.func, node.args, [*node.keywords[:i], *node.keywords[i + 1 :]])


def _is_choice(node: ast.AST) -> bool:
    """The names of an option's values, whose order means nothing."""
    return isinstance(node, ast.Tuple) and len(node.elts) > 1 and all(map(_is_text, node.elts))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


# Statements


def mutants_of(tree: ast.Module) -> list[Mutant]:
    """All mutants of a module's syntax tree, in the order of the file."""
    modules = {a.asname or a.name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names}
    found: dict[tuple[int, str], Mutant] = {}
    for statement in _statements(tree, "body", _Scope("", set(), Counter())):
        for mutant in statement.mutants():
            # The same program twice is one mutant; `torch` alone in the place of `torch.rand(...)` is none at all
            if mutant.after != mutant.before and ast.unparse(mutant.replacement) not in modules:
                found.setdefault((id(statement.node), mutant.after), mutant)
    return list(found.values())


@dataclass
class _Statement:
    """A statement in its block, with the function that it belongs to."""

    node: ast.stmt
    owner: ast.AST
    field: str
    index: int
    function: str
    number: int
    droppable: bool

    def mutants(self) -> Iterator[Mutant]:
        before = _head(self.node)
        if self.droppable:
            yield self._mutant("drop a statement", before, self.owner, self.field, self.index, ast.Pass())
        for owner, field, index, child in _expressions(self.node):
            for operator, make in RULES:
                for new in make(child, owner):
                    yield self._mutant(operator, before, owner, field, index, new)
        if isinstance(self.node, ast.FunctionDef):
            yield from self._decorators(self.node, before)
            yield from self._defaults(self.node, before)

    def _decorators(self, node: ast.FunctionDef, before: str) -> Iterator[Mutant]:
        for i in range(len(node.decorator_list)):
            identity = ast.Lambda(ast.arguments([], [ast.arg("f")], None, [], [], None, []), ast.Name("f", ast.Load()))
            yield self._mutant("drop a decorator", before, node, "decorator_list", i, identity)

    def _defaults(self, node: ast.FunctionDef, before: str) -> Iterator[Mutant]:
        """Numbers and truth values are shifted by the rules; another text, and a number for None."""
        for field in ("defaults", "kw_defaults"):
            for i, default in enumerate(getattr(node.args, field)):
                if isinstance(default, ast.Constant) and (default.value is None or isinstance(default.value, str)):
                    new = ast.Constant(0 if default.value is None else "")
                    yield self._mutant("replace a default", before, node.args, field, i, new)

    def _mutant(self, operator: str, before: str, owner: ast.AST, field: str, index: int | None, new: ast.AST) -> Mutant:
        ast.fix_missing_locations(ast.copy_location(new, self.node))
        at = getattr(getattr(owner, field) if index is None else getattr(owner, field)[index], "lineno", self.node.lineno)
        mutant = Mutant(self.function, at, operator, before, "", self.number, owner, field, index, new)
        with mutant.applied():
            dropped = isinstance(new, ast.Pass)
            after = "pass" if dropped else _head(self.node)
        return Mutant(self.function, at, operator, before, after, self.number, owner, field, index, new)


@dataclass
class _Scope:
    """A function (or the module), the local names that have a value already, and how often each statement was met."""

    function: str
    bound: set[str]
    seen: Counter[str]


def _statements(owner: ast.AST, field: str, scope: _Scope) -> Iterator[_Statement]:
    """The executable statements of a block and of the blocks inside it."""
    block: list[ast.stmt] = getattr(owner, field)
    for index, node in enumerate(block):
        if _is_exempt(node):
            continue
        inner = scope
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            arguments = [a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)] if isinstance(node, ast.FunctionDef) else []
            inner = _Scope(f"{scope.function}.{node.name}".lstrip("."), set(arguments), Counter())
        inner.seen[_head(node)] += 1
        last = index == len(block) - 1 and isinstance(owner, ast.FunctionDef)
        function = inner.function or _assigned_name(node)
        yield _Statement(node, owner, field, index, function, inner.seen[_head(node)], _can_drop(node, scope.bound, last))
        for inside in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, inside, None), list):
                yield from _statements(node, inside, inner)
        scope.bound.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def _assigned_name(node: ast.stmt) -> str:
    """A constant of the module goes by its name."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return next((t.id for t in targets if isinstance(t, ast.Name)), "")


def _is_exempt(node: ast.stmt) -> bool:
    """Imports, docstrings, `PAPER`, `__main__`, type variables, and fields of a NamedTuple, which are annotations."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Pass) or (isinstance(node, ast.Expr) and _is_text(node.value)):
        return True
    if isinstance(node, ast.AnnAssign) and node.value is None:
        return True
    main = isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and ast.unparse(node.test.left) == "__name__"
    types = isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "TypeVar"
    return main or types or _assigned_name(node) == "PAPER"


def _can_drop(node: ast.stmt, bound: set[str], last: bool) -> bool:
    """Whether the function still runs without the statement; a missing first assignment is a NameError and no mutant."""
    if isinstance(node, ast.Return):
        return not last
    if isinstance(node, ast.Assign):
        names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        return all(name in bound for name in names)  # true for attributes and entries, which store under no new name
    return isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Delete | ast.For | ast.Assert)


def _expressions(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every expression in a statement as (owner, field, index, expression), without those of inner statements."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "ctx") or isinstance(node, ast.Raise | ast.JoinedStr):
            continue
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if isinstance(child, ast.AST) and not isinstance(child, ast.stmt):
                yield node, field, index, child
                yield from _expressions(child)


def _head(node: ast.stmt) -> str:
    """The statement on one line; of a compound one just its head."""
    if isinstance(node, ast.FunctionDef):
        return "".join(f"@{ast.unparse(d)} " for d in node.decorator_list) + f"def {node.name}({_parameters(node.args)})"
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return f"raise {ast.unparse(node.exc.func)}"  # without the message, so that its words can be improved
    return ast.unparse(node).splitlines()[0].rstrip(":")


def _parameters(arguments: ast.arguments) -> str:
    """The parameters that have a default."""
    bare = deepcopy(arguments)
    for argument in ast.walk(bare):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    positional = [*bare.posonlyargs, *bare.args]
    with_default = positional[len(positional) - len(bare.defaults) :]
    pairs = [*zip(with_default, bare.defaults, strict=True), *zip(bare.kwonlyargs, bare.kw_defaults, strict=True)]
    return ", ".join(f"{a.arg}={ast.unparse(d)}" for a, d in pairs if d is not None)


# Who calls whom


def reach(tree: ast.Module) -> dict[str, frozenset[str]]:
    """For each function, class and constant of a module the names of all that it may run, itself among them."""
    units: dict[str, ast.stmt] = {}
    for node in tree.body:
        name = node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else _assigned_name(node)
        if name:
            units[name] = node
    uses = {name: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & units.keys() for name, node in units.items()}
    return {name: frozenset(_closure(name, uses)) for name in units}


def _closure(name: str, uses: dict[str, set[str]]) -> set[str]:
    found, waiting = {name}, [name]
    while waiting:
        new = uses[waiting.pop()] - found
        found |= new
        waiting += new
    return found
