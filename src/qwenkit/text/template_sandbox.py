"""The environment in which chat templates are compiled and run: jinja2's sandbox, with limits on time and sizes.

Operators, methods, filters and tests whose result or work may be much larger than the template ask the budget of the
render first (template_budget.py). The Python code that jinja2 makes of a template gets a tick in every loop, function and
comparison, and limited functions instead of `str` and the like. Nothing is computed when a template is compiled.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from types import BuiltinMethodType, MethodType
from typing import Any, cast

from jinja2 import Template, nodes
from jinja2 import runtime as jinja
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from qwenkit.text import template_filters as filters
from qwenkit.text import template_operators as limits
from qwenkit.text.template_budget import SCALARS, Budget, LimitError, Rendering, budget, measure

Test = Callable[..., Any]

MAX_SOURCE = 1_000_000  # characters of a template


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Templates as transformers runs them. `marks`: what stands before and after the body of a {% generation %} block."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, marks: tuple[str, str]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
            cache_size=0,
        )
        self.generation_marks = marks
        self.filters = {name: filters.limited_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = filters.tojson
        self.tests = {name: filters.limited_test(name, cast(Test, function)) for name, function in self.tests.items()}
        self.globals["lipsum"] = filters.lipsum
        self.globals["raise_exception"] = filters.raise_exception
        self.globals["strftime_now"] = filters.strftime_now

    def limited_template(self, source: str) -> Template:
        """Compile a template. Raises what jinja2 raises, LimitError for one that is too long, RecursionError for deep nesting."""
        if len(source) > MAX_SOURCE:
            raise LimitError(f"is {len(source)} characters long, allowed are at most {MAX_SOURCE}")
        try:
            tree = _Instrument().visit(ast.parse(self.compile(source, raw=True)))
            code = compile(ast.fix_missing_locations(tree), "<chat template>", "exec")
        except (MemoryError, SyntaxError, OverflowError) as error:  # what Python's own parser says of deep nesting
            raise RecursionError(str(error)) from None
        return Template.from_code(self, code, self.make_globals(None))

    concat = staticmethod(limits.concat)

    def call_binop(self, context: jinja.Context, operator: str, left: Any, right: Any) -> Any:
        limits.check_operator(operator, left, right)
        return budget().made(self.binop_table[operator](left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)  # the two most common ones without the sandbox's general way, which gives the same
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind is str and attribute in _STR_METHODS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) not in SCALARS:
            budget().walk(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        return None if wrapped is None else limits.limited_format(value, wrapped)

    def call(__self, __context: jinja.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        limit = budget()
        kind = type(__obj)
        given = {name: value for name, value in kwargs.items() if name not in _SCOPES} if kwargs else kwargs
        if kind is BuiltinMethodType and not given and limits.is_cheap(__obj.__self__, __obj.__name__, args):
            limit.tick()
            return __obj(*args)
        limit.tick(4)
        if kind in _UNLIMITED or __obj is Namespace:
            return super().call(__context, __obj, *args, **kwargs)
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, BuiltinMethodType | MethodType) and isinstance(owner, limits.BUILTINS):
            args = limits.check_method(owner, __obj.__name__, args, given)
        else:
            limits.check_arguments(args, given)
        return limit.made(super().call(__context, __obj, *args, **kwargs))


_DICT_ATTRIBUTES = frozenset(dir(dict))
_STR_METHODS = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))
_SCOPES = ("_loop_vars", "_block_vars")  # what jinja2 tells functions of the variables around their call
_UNLIMITED = (jinja.Macro, jinja.BlockReference)  # programs of the template: what they do is counted there


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """The text of a template, within limits that grow with its variables.

    Raises LimitError, and whatever else may come out of a foreign program.
    """
    values = dict(variables)
    with Rendering(Budget(measure(values))):
        return limits.concat(template.root_render_func(template.new_context(values)))


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: the body as it is, between two marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = self.environment.generation_marks  # type: ignore[attr-defined]
        start, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in marks)
        return [start, *body, end]


# Names of the module that jinja2 makes, and what stands for them.
_REPLACED = {
    "str": "to_text",
    "escape": "limited_escape",
    "str_join": "str_join",
    "markup_join": "markup_join",
    "_tick": "tick",
    "_sliced": "sliced",
    "_scalar": "scalar",
    "_contains": "contains",
}


class _Instrument(ast.NodeTransformer):
    """Puts ticks and limited functions into the Python code of a template."""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        names = [ast.alias(name=new, asname=old) for old, new in _REPLACED.items()]
        imports = [index for index, line in enumerate(node.body) if isinstance(line, ast.ImportFrom)]
        ours = ast.ImportFrom(module=limits.__name__, names=names, level=0)
        node.body.insert(imports[-1] + 1 if imports else 0, ours)
        return node

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        node.body.insert(0, ast.Expr(_call("_tick")))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.body.insert(0, ast.Expr(_call("_tick")))
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops):
            return node
        if len(node.ops) == 1 and isinstance(node.ops[0], ast.In | ast.NotIn):
            found = _call("_contains", node.left, node.comparators[0])
            return found if isinstance(node.ops[0], ast.In) else ast.UnaryOp(op=ast.Not(), operand=found)
        node.left, *node.comparators = [_scalar(side) for side in (node.left, *node.comparators)]
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        is_read = isinstance(node.ctx, ast.Load) and isinstance(node.slice, ast.Slice)
        return _call("_sliced", node) if is_read else node

    def visit_Dict(self, node: ast.Dict) -> ast.Dict:
        self.generic_visit(node)
        node.keys = [None if key is None else _scalar(key) for key in node.keys]
        return node


def _scalar(node: ast.expr) -> ast.expr:
    return node if isinstance(node, ast.Constant) else _call("_scalar", node)


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(func=ast.Name(id=name, ctx=ast.Load()), args=list(arguments), keywords=[])
