"""`--where`: a small expression over one message, such as `value.status >= 500 and startswith(topic, "logs.")`.

Python parses the text; nothing of it is ever executed. The syntax tree is checked node by node against a short
list and turned into closures, so an expression reaches the message and nothing else: no attributes of Python
objects, no calls but the functions below, no names but the message's fields.

    names        topic value seq origin node time age size headers offset attempt; true false null
    lookup       value.status  value["a b"][0]   keys of maps, indexes of arrays, never Python attributes
    comparison   == != < <= > >= in, not in; chains such as 200 <= value.status < 300
    logic        and or not; the result is always true or false
    arithmetic   + - * / // % on numbers
    literals     numbers, text, b"bytes", [1, 2], (1, 2), {1, 2}
    functions    has(value.x) len(x) lower(x) int(x) float(x) str(x)
                 startswith(x, y) endswith(x, y) contains(x, y) matches(x, r"regex")

Nothing goes wrong at evaluation. What is not there, or not of the right type, is *missing*; every comparison with
something missing is false (also `!=`), and so is a comparison of types that have no order, such as text with number.

`matches` searches with Python's `re` in the first 2,048 characters. The publisher chooses that text and you choose
the pattern: one with nested repeats, like `(a+)+$`, can still take exponential time. Atomic groups `(?>…)` avoid it.
"""

from __future__ import annotations

import ast
import keyword
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

from zmqbus.cli.messages.forms import FIELDS
from zmqbus.errors import WhereError

TEXT_CHARS_MAX = 1_000  # bounds the parser's work and every literal
DEPTH_MAX = 50  # nested nodes; evaluation recurses as deep, and the stack must hold
INT_BITS_MAX = 1_024  # products of products stay cheap; messages carry 64 bits
NUMBER_CHARS_MAX = 400  # examined by int() and float(): reading digits is quadratic
MATCH_CHARS_MAX = 2_048  # examined by matches(): bounds patterns that are quadratic to some 10 ms


class _Missing:
    """What is not there, or has no such value."""

    def __repr__(self) -> str:
        return "MISSING"

    def __bool__(self) -> bool:
        return False


MISSING: Final = _Missing()

Evaluate = Callable[[Mapping[str, Any]], Any]


def compile_where(text: str) -> Callable[[Mapping[str, Any]], bool]:
    """Turn an expression into a test of a message's fields (see `forms.Fields`). Raises WhereError.

    The test never raises, whatever the message holds.
    """
    evaluate = _Compiler(text).compile_text()

    def where(fields: Mapping[str, Any]) -> bool:
        try:
            return bool(evaluate(fields))
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            return False  # a last guard: each step below answers MISSING or False by itself

    return where


def lookup(container: Any, key: Any) -> Any:
    """The item of a map, array, text or bytes, or MISSING. Never a Python attribute."""
    try:
        if type(container) is dict:
            return container.get(key, MISSING)
        if type(container) in (list, tuple, str, bytes) and type(key) is int:
            return container[key]
    except (TypeError, IndexError):  # an unhashable key, an index past the end
        pass
    return MISSING


# --- evaluation: every function here takes any value at all ---------------------------------------


def _compare(compare: Callable[[Any, Any], Any], left: Any, right: Any) -> bool:
    if left is MISSING or right is MISSING:
        return False
    try:
        return bool(compare(left, right))
    except (TypeError, ValueError, RecursionError):
        return False


def _arithmetic(calculate: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    # Numbers only: `*` would repeat text without bound, and `%` would format it.
    if not isinstance(left, int | float) or not isinstance(right, int | float):
        return MISSING
    try:
        return _bounded(calculate(left, right))
    except ArithmeticError:
        return MISSING


def _bounded(number: Any) -> Any:
    return MISSING if isinstance(number, int) and number.bit_length() > INT_BITS_MAX else number


def _in(item: Any, container: Any) -> bool:
    return bool(item in container)


def _not_in(item: Any, container: Any) -> bool:
    return item not in container


def _length(x: Any) -> Any:
    return len(x) if isinstance(x, str | bytes | list | tuple | dict) else MISSING


def _lower(x: Any) -> Any:
    return x.lower() if isinstance(x, str) else MISSING


def _to_number(kind: type[int] | type[float], x: Any) -> Any:
    if not isinstance(x, int | float | str) or (isinstance(x, str) and len(x) > NUMBER_CHARS_MAX):
        return MISSING
    try:
        return _bounded(kind(x))
    except (ValueError, OverflowError):
        return MISSING


def _int(x: Any) -> Any:
    return _to_number(int, x)


def _float(x: Any) -> Any:
    return _to_number(float, x)


def _str(x: Any) -> Any:
    if isinstance(x, bytes):
        return x.decode("utf-8", "replace")
    return str(x) if isinstance(x, int | float | str) else MISSING


def _same_text(x: Any, y: Any) -> bool:
    return (isinstance(x, str) and isinstance(y, str)) or (isinstance(x, bytes) and isinstance(y, bytes))


def _starts_with(x: Any, y: Any) -> bool:
    return _same_text(x, y) and x.startswith(y)


def _ends_with(x: Any, y: Any) -> bool:
    return _same_text(x, y) and x.endswith(y)


def _contains(x: Any, y: Any) -> bool:
    return _compare(_in, y, x)


_FUNCTIONS: Mapping[str, tuple[int, Callable[..., Any]]] = {
    "len": (1, _length),
    "lower": (1, _lower),
    "int": (1, _int),
    "float": (1, _float),
    "str": (1, _str),
    "startswith": (2, _starts_with),
    "endswith": (2, _ends_with),
    "contains": (2, _contains),
}
_NAMES = ", ".join(FIELDS)
_FUNCTION_NAMES = ", ".join(["has", "matches", *_FUNCTIONS])
_CONSTANTS: Mapping[str, Any] = {"true": True, "false": False, "null": None}

_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: _in,
    ast.NotIn: _not_in,
}
_CALCULATIONS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}

# --- compilation: a whitelist; whatever is not named here is refused --------------------------------


class _Compiler:
    def __init__(self, text: str) -> None:
        self._text = text

    def compile_text(self) -> Evaluate:
        if len(self._text) > TEXT_CHARS_MAX:
            reason = f"{len(self._text):,} characters; the limit is {TEXT_CHARS_MAX:,}"
            raise WhereError(self._text, TEXT_CHARS_MAX, reason)
        # One line, so that a column is a position. Leading blanks would be an indentation error.
        line = re.sub(r"[\t\n\f\r]", " ", self._text)
        indent = len(line) - len(line.lstrip(" "))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's advice on odd literals is not ours to print
                tree = ast.parse(line[indent:], mode="eval")
        except SyntaxError as error:
            raise self._syntax_error(indent, error) from None
        except (ValueError, MemoryError, RecursionError, OverflowError):
            raise WhereError(self._text, 0, "Python cannot parse this text") from None
        self._bytes = line[indent:].encode()
        self._indent = indent
        return self._compile(tree.body, 1)

    def _syntax_error(self, indent: int, error: SyntaxError) -> WhereError:
        for match in re.finditer(r"\.\s*([A-Za-z]+)", self._text):
            if keyword.iskeyword(match[1]):
                hint = f'{match[1]!r} is a word of the language: as a key, write ["{match[1]}"]'
                return WhereError(self._text, match.start(1), hint)
        end = len(self._text.rstrip())
        position = min(indent + error.offset - 1, end) if error.offset else end  # 0 or None: at the end
        if position == end:
            return WhereError(self._text, end, "it is empty" if end == 0 else "it ends too early")
        reason = "write == to compare" if self._text[position] == "=" else error.msg
        return WhereError(self._text, position, reason)

    def _error(self, node: ast.expr, reason: str) -> WhereError:
        # ast counts columns in UTF-8 bytes.
        characters = len(self._bytes[: node.col_offset].decode("utf-8", "replace"))
        return WhereError(self._text, self._indent + characters, reason)

    def _compile(self, node: ast.expr, depth: int) -> Evaluate:
        if depth > DEPTH_MAX:
            raise self._error(node, f"nested deeper than {DEPTH_MAX} levels")
        match node:
            case ast.Constant() | ast.List() | ast.Tuple() | ast.Set():
                constant = self._literal(node, depth)
                return lambda fields: constant
            case ast.Name():
                return self._name(node)
            case ast.Attribute(value=inner, attr=key):
                if key.startswith("__"):
                    raise self._error(node, f'{key!r} looks like a Python attribute; for a key, write ["{key}"]')
                container = self._compile(inner, depth + 1)
                return lambda fields: lookup(container(fields), key)
            case ast.Subscript(value=inner, slice=index):
                container, index_of = self._compile(inner, depth + 1), self._compile(index, depth + 1)
                return lambda fields: lookup(container(fields), index_of(fields))
            case ast.BoolOp(op=op, values=values):
                parts = [self._compile(value, depth + 1) for value in values]
                if isinstance(op, ast.And):
                    return lambda fields: all(part(fields) for part in parts)
                return lambda fields: any(part(fields) for part in parts)
            case ast.UnaryOp():
                return self._unary(node, depth)
            case ast.BinOp(left=left, op=op, right=right):
                if (calculate := _CALCULATIONS.get(type(op))) is None:
                    raise self._error(node, "the operators are + - * / // %")
                a, b = self._compile(left, depth + 1), self._compile(right, depth + 1)
                return lambda fields: _arithmetic(calculate, a(fields), b(fields))
            case ast.Compare():
                return self._comparison(node, depth)
            case ast.Call():
                return self._call(node, depth)
        grammar = "fields, keys, literals, comparisons, and/or/not, + - * / // % and functions"
        raise self._error(node, f"{type(node).__name__} is not part of this language: it has {grammar}")

    def _literal(self, node: ast.expr, depth: int) -> Any:
        if depth > DEPTH_MAX:
            raise self._error(node, f"nested deeper than {DEPTH_MAX} levels")
        match node:
            case ast.Constant(value=None | str() | bytes() | bool() | float() as constant):
                return constant
            case ast.Constant(value=int() as number):
                if _bounded(number) is MISSING:
                    raise self._error(node, f"a number of more than {INT_BITS_MAX} bits")
                return number
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
                return -self._literal(node.operand, depth + 1)
            case ast.Name(id=name) if name in _CONSTANTS:
                return _CONSTANTS[name]
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._literal(item, depth + 1) for item in items]  # a list: as arrays arrive
            case ast.Set(elts=items):
                members = [self._literal(item, depth + 1) for item in items]
                if any(isinstance(member, list | frozenset) for member in members):
                    raise self._error(node, "a set holds numbers and text only")
                return frozenset(members)
        raise self._error(node, "only literals (numbers, text, lists of them) may stand here")

    def _name(self, node: ast.Name) -> Evaluate:
        name = node.id
        if name in _CONSTANTS:
            constant = _CONSTANTS[name]
            return lambda fields: constant
        if name not in FIELDS:
            hint = 'a key that is no plain word goes in brackets: value["content-type"]'
            raise self._error(node, f"unknown name {name!r}; a message has {_NAMES}; {hint}")
        return lambda fields: fields.get(name, MISSING)

    def _unary(self, node: ast.UnaryOp, depth: int) -> Evaluate:
        operand = self._compile(node.operand, depth + 1)
        match node.op:
            case ast.Not():
                return lambda fields: not operand(fields)
            case ast.USub():
                return lambda fields: _arithmetic(operator.sub, 0, operand(fields))
            case ast.UAdd():
                return lambda fields: _arithmetic(operator.add, 0, operand(fields))
        raise self._error(node, "~ is not part of this language")

    def _comparison(self, node: ast.Compare, depth: int) -> Evaluate:
        operands = [self._compile(operand, depth + 1) for operand in (node.left, *node.comparators)]
        compares = []
        for op in node.ops:
            if (compare := _COMPARISONS.get(type(op))) is None:
                raise self._error(node, "write == or != instead of is")
            compares.append(compare)

        def chain(fields: Mapping[str, Any]) -> bool:
            left = operands[0](fields)
            for compare, operand in zip(compares, operands[1:], strict=True):
                right = operand(fields)
                if not _compare(compare, left, right):
                    return False
                left = right
            return True

        return chain

    def _call(self, node: ast.Call, depth: int) -> Evaluate:
        if not isinstance(node.func, ast.Name):
            raise self._error(node, f'write contains(topic, "web"), not topic.contains("web"); {_FUNCTION_NAMES}')
        name = node.func.id
        if name not in ("has", "matches") and name not in _FUNCTIONS:
            raise self._error(node, f"unknown function {name!r}; there are {_FUNCTION_NAMES}")
        arity = {"has": 1, "matches": 2}.get(name) or _FUNCTIONS[name][0]
        if node.keywords or len(node.args) != arity or any(isinstance(arg, ast.Starred) for arg in node.args):
            raise self._error(node, f"{name}() takes exactly {arity} argument{'s' if arity > 1 else ''}")
        args = [self._compile(arg, depth + 1) for arg in node.args]
        if name == "has":
            if not isinstance(node.args[0], ast.Name | ast.Attribute | ast.Subscript):
                raise self._error(node, "has() takes a name or a key, such as has(value.status)")
            [x] = args
            return lambda fields: x(fields) is not MISSING
        if name == "matches":
            return self._matches(args[0], node.args[1])
        function = _FUNCTIONS[name][1]
        if arity == 1:
            [x] = args
            return lambda fields: function(x(fields))
        x, y = args
        return lambda fields: function(x(fields), y(fields))

    def _matches(self, x: Evaluate, pattern: ast.expr) -> Evaluate:
        if not isinstance(pattern, ast.Constant) or not isinstance(pattern.value, str):
            raise self._error(pattern, 'matches() takes its pattern as a literal, such as r"timeout|refused"')
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                search = re.compile(pattern.value).search
        except (re.error, OverflowError, RecursionError) as error:
            raise self._error(pattern, f"bad regular expression: {error}") from None

        def matches(fields: Mapping[str, Any]) -> bool:
            text = x(fields)
            return isinstance(text, str) and search(text[:MATCH_CHARS_MAX]) is not None

        return matches
