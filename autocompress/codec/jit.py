"""Compiles loops over integers: a small subset of Python to machine code, through LLVM.

A kernel is a plain function whose parameters are annotated with `Int` (64 bits) or with an array
type. Its body may use integer arithmetic, comparisons, `and` / `or` / `not`, conditional
expressions, `if`, `while`, `for ... in range(...)`, `break`, `continue`, `return`, arrays by
index, `min` / `max` / `abs` / `int` and calls of other kernels, which are inlined; anything else is
refused. Everything is a 64-bit integer and wraps around like one; a variable is 0 before it is
assigned, module constants are read when a kernel is compiled, and nothing is checked at run time:
kernels see to their indices, divisors and shifts (0 to 63). Run as ordinary Python a kernel gives
the same results, only a thousand times slower: that is how it is tested. Its module needs
`from __future__ import annotations`.

Why not Numba: its first compilation of the coder takes 4 to 7 seconds, nearly all of them in
type inference over Python objects, and its cache cannot be shipped. Here the types are known, so
what is left is LLVM's own half second. Calls go through ctypes and so release the interpreter lock.
"""

from __future__ import annotations

import ast
import ctypes
import inspect
import os
import textwrap
import threading
from collections.abc import Callable
from functools import cache, cached_property
from itertools import pairwise
from operator import index
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Int: TypeAlias = int
Bytes: TypeAlias = NDArray[np.uint8]
Words: TypeAlias = NDArray[np.uint16]
Int32s: TypeAlias = NDArray[np.int32]
Int64s: TypeAlias = NDArray[np.int64]

_ARRAYS = {"Bytes": ("u1", 8), "Words": ("u2", 16), "Int32s": ("i4", 32), "Int64s": ("i8", 64)}
"""NumPy's code and the bits of an element; arrays have one axis and are contiguous. Bytes and words are unsigned."""
_KINDS = ("Int", *_ARRAYS)


class Kernel:
    """A compiled function. Called with integers and NumPy arrays, it returns an integer.

    Raises TypeError for arguments of another kind: arrays of another element type or more axes, not
    contiguous, or sharing memory with one another.
    """

    def __init__(self, function: Callable[..., Any]):
        self.python = function
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        parameters = inspect.signature(function).parameters.values()
        self.names = [p.name for p in parameters]
        self.kinds = [str(p.annotation) for p in parameters]
        for p in parameters:
            if p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty or str(p.annotation) not in _KINDS:
                raise TypeError(f"{self.__name__}: parameter {p} is not supported in a kernel")

    @cached_property
    def body(self) -> list[ast.stmt]:
        """The function's statements."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.python))).body[0]
        if not isinstance(tree, ast.FunctionDef):
            raise TypeError(f"{self.__name__} is no plain function")
        return tree.body

    def __call__(self, *arguments: Any) -> int:
        if len(arguments) != len(self.kinds):
            raise TypeError(f"{self.__name__} takes {len(self.kinds)} arguments, {len(arguments)} were given")
        given = [self._argument(*each) for each in zip(self.names, self.kinds, arguments, strict=True)]
        spans = sorted(
            (a.ctypes.data, a.ctypes.data + a.nbytes) for a in arguments if isinstance(a, np.ndarray) and a.size
        )
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise TypeError(f"{self.__name__}: two of its arrays share memory")
        result: int = _load(self)(*given)
        return result

    def _argument(self, name: str, kind: str, value: Any) -> Any:
        if kind == "Int":
            number = index(value)
            if not -(1 << 63) <= number < 1 << 63:
                raise TypeError(f"{self.__name__}: {name} is {number}, which needs more than 64 bits")
            return number
        code = np.dtype(_ARRAYS[kind][0])
        if not (isinstance(value, np.ndarray) and value.dtype == code and value.ndim == 1 and value.flags.c_contiguous):
            raise TypeError(f"{self.__name__}: {name} must be a contiguous array of {code} with one axis")
        return value.ctypes.data


def kernel(function: Callable[..., Any]) -> Kernel:
    """Decorator: the function is compiled when it is first called."""
    return Kernel(function)


_lock = threading.RLock()
"""Held while compiling, and over a fork, so that no child inherits LLVM in the middle of something."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _load(entry: Kernel) -> Callable[..., int]:
    with _lock:
        return _compile(entry)


@cache
def _compile(entry: Kernel) -> Callable[..., int]:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(str(_translate(entry)))
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    kinds = [ctypes.c_int64 if kind == "Int" else ctypes.c_void_p for kind in entry.kinds]
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *kinds)(engine.get_function_address(f"{entry.__name__}.0"))
    function.engine = engine  # type: ignore[attr-defined]  # lives as long as the function
    return function


def _translate(entry: Kernel) -> Any:
    """The LLVM module of a kernel and of all that it calls."""
    from llvmlite import ir

    module = ir.Module(name=entry.__name__)
    done: dict[Kernel, Any] = {}

    def declare(kernel: Kernel) -> Any:
        if kernel not in done:
            i64 = ir.IntType(64)
            types = [i64 if k == "Int" else ir.IntType(_ARRAYS[k][1]).as_pointer() for k in kernel.kinds]
            function = ir.Function(module, ir.FunctionType(i64, types), f"{kernel.__name__}.{len(done)}")
            for argument, kind in zip(function.args, kernel.kinds, strict=True):
                if kind != "Int":
                    argument.add_attribute("noalias")
            if kernel is not entry:
                function.linkage = "internal"
                function.attributes.add("alwaysinline")
            done[kernel] = function
            _Translator(kernel, function, declare).run()
        return done[kernel]

    declare(entry)
    return module


class _Translator:
    """One function's body to LLVM instructions. All variables live in stack slots, which LLVM turns into registers."""

    def __init__(self, kernel: Kernel, function: Any, declare: Callable[[Kernel], Any]):
        from llvmlite import ir

        self.ir, self.kernel, self.function, self.declare = ir, kernel, function, declare
        self.i64 = ir.IntType(64)
        self.entry = function.append_basic_block("entry")
        self.b = ir.IRBuilder(function.append_basic_block("body"))
        self.slots: dict[str, Any] = {}
        self.arrays: dict[str, tuple[Any, str]] = {}
        self.loops: list[tuple[Any, Any]] = []
        self.globals = {**kernel.python.__globals__, **inspect.getclosurevars(kernel.python).nonlocals}

    def run(self) -> None:
        body = self.b.block
        for argument, name, kind in zip(self.function.args, self.kernel.names, self.kernel.kinds, strict=True):
            if kind == "Int":
                self.b.store(argument, self.slot(name))
            else:
                self.arrays[name] = (argument, kind)
        self.block(self.kernel.body)
        if not self.b.block.is_terminated:
            self.b.ret(self.constant(0))
        self.ir.IRBuilder(self.entry).branch(body)

    def constant(self, value: int) -> Any:
        return self.ir.Constant(self.i64, value)

    def slot(self, name: str) -> Any:
        if name not in self.slots:
            if name in self.arrays:
                raise TypeError(f"{self.kernel.__name__}: the array {name} is assigned to")
            at_start = self.ir.IRBuilder(self.entry)
            self.slots[name] = at_start.alloca(self.i64, name=name)
            at_start.store(self.constant(0), self.slots[name])
        return self.slots[name]

    # statements

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if self.b.block.is_terminated:
                return
            handle = getattr(self, f"do_{type(statement).__name__.lower()}", None)
            if handle is None or (getattr(statement, "orelse", None) and not isinstance(statement, ast.If)):
                raise self.unknown(statement)
            handle(statement)

    def do_expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.value(node.value)

    def do_pass(self, node: ast.Pass) -> None:
        pass

    def do_assign(self, node: ast.Assign) -> None:
        value = self.value(node.value)
        for target in node.targets:
            self.store(target, value)

    def do_augassign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            return self.store(node.target, self.arithmetic(node.op, self.value(node.target), self.value(node.value)))
        place = self.element(node.target)
        value = self.arithmetic(node.op, self.load(*place), self.value(node.value))
        return self.put(*place, value)

    def store(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.b.store(value, self.slot(target.id))
        elif isinstance(target, ast.Subscript):
            self.put(*self.element(target), value)
        else:
            raise self.unknown(target)

    def put(self, pointer: Any, kind: str, value: Any) -> None:
        width = _ARRAYS[kind][1]
        self.b.store(value if width == 64 else self.b.trunc(value, self.ir.IntType(width)), pointer)

    def do_return(self, node: ast.Return) -> None:
        self.b.ret(self.constant(0) if node.value is None else self.value(node.value))

    def do_if(self, node: ast.If) -> None:
        then, otherwise, after = (self.function.append_basic_block() for _ in range(3))
        self.b.cbranch(self.truth(node.test), then, otherwise)
        for start, body in ((then, node.body), (otherwise, node.orelse)):
            self.b.position_at_end(start)
            self.block(body)
            if not self.b.block.is_terminated:
                self.b.branch(after)
        self.b.position_at_end(after)

    def do_while(self, node: ast.While) -> None:
        head, body, after = (self.function.append_basic_block() for _ in range(3))
        self.b.branch(head)
        self.b.position_at_end(head)
        self.b.cbranch(self.truth(node.test), body, after)
        self.b.position_at_end(body)
        self.loop(node.body, head, after)
        self.b.position_at_end(after)

    def do_for(self, node: ast.For) -> None:
        match node:
            case ast.For(
                target=ast.Name(id=name), iter=ast.Call(func=ast.Name(id="range"), args=given, keywords=[])
            ) if len(given) in (1, 2) and not self.hides("range"):
                bounds = [self.value(argument) for argument in given]
            case _:
                raise self.unknown(node.iter)
        start, stop = bounds if len(bounds) == 2 else (self.constant(0), bounds[0])
        counter = self.slot(f"{name}.{id(node)}")
        self.b.store(start, counter)
        head, body, step, after = (self.function.append_basic_block() for _ in range(4))
        self.b.branch(head)
        self.b.position_at_end(head)
        self.b.cbranch(self.b.icmp_signed("<", self.b.load(counter), stop), body, after)
        self.b.position_at_end(body)
        self.b.store(self.b.load(counter), self.slot(name))
        self.loop(node.body, step, after)
        self.b.position_at_end(step)
        self.b.store(self.b.add(self.b.load(counter), self.constant(1)), counter)
        self.b.branch(head)
        self.b.position_at_end(after)

    def loop(self, body: list[ast.stmt], again: Any, after: Any) -> None:
        self.loops.append((again, after))
        self.block(body)
        self.loops.pop()
        if not self.b.block.is_terminated:
            self.b.branch(again)

    def do_break(self, node: ast.Break) -> None:
        self.b.branch(self.loops[-1][1])

    def do_continue(self, node: ast.Continue) -> None:
        self.b.branch(self.loops[-1][0])

    # expressions

    def value(self, node: ast.expr) -> Any:  # noqa: PLR0911
        """The 64-bit value of an expression."""
        match node:
            case ast.Constant(value=int(value)) if -(1 << 63) <= value < 1 << 63:
                return self.constant(int(value))
            case ast.Name(id=name) if name in self.slots:
                return self.b.load(self.slots[name])
            case ast.Name(id=name) if isinstance(self.globals.get(name), int):
                return self.constant(int(self.globals[name]))
            case ast.Subscript():
                return self.load(*self.element(node))
            case ast.BinOp(op=ast.LShift() | ast.RShift(), right=ast.Constant(value=int(by))) if not 0 <= by < 64:
                raise self.unknown(node)
            case ast.BinOp(left=left, op=op, right=right):
                return self.arithmetic(op, self.value(left), self.value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.b.neg(self.value(operand))
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return self.b.not_(self.value(operand))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.choose(self.truth(test), lambda: self.value(body), lambda: self.value(orelse))
            case ast.BoolOp(values=operands) if not all(map(_is_condition, operands)):
                raise self.unknown(node)  # would be one of them, not whether they hold
            case ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
                return self.b.zext(self.truth(node), self.i64)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self.call(node, name, arguments)
        raise self.unknown(node)

    def truth(self, node: ast.expr) -> Any:
        """The one-bit value of a condition."""
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                signs = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
                sign = signs.get(type(op))
                if sign is None:
                    raise self.unknown(node)
                return self.b.icmp_signed(sign, self.value(left), self.value(right))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self.b.not_(self.truth(operand))
            case ast.BoolOp(op=op, values=[first, *others]):
                rest: ast.expr = others[0] if len(others) == 1 else ast.BoolOp(op, others)
                known = self.ir.Constant(self.ir.IntType(1), int(isinstance(op, ast.Or)))
                tested, either = self.truth(first), (lambda: known, lambda: self.truth(rest))
                return self.choose(tested, *(either if isinstance(op, ast.Or) else either[::-1]))
            case ast.Compare():
                raise self.unknown(node)
        return self.b.icmp_signed("!=", self.value(node), self.constant(0))

    def choose(self, condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        starts, after = [self.function.append_basic_block() for _ in range(2)], self.function.append_basic_block()
        self.b.cbranch(condition, *starts)
        found = []
        for start, make in zip(starts, (then, otherwise), strict=True):
            self.b.position_at_end(start)
            found.append((make(), self.b.block))
            self.b.branch(after)
        self.b.position_at_end(after)
        result = self.b.phi(found[0][0].type)
        for value, block in found:
            result.add_incoming(value, block)
        return result

    def arithmetic(self, op: ast.operator, a: Any, b: Any) -> Any:
        simple = {
            ast.Add: self.b.add, ast.Sub: self.b.sub, ast.Mult: self.b.mul, ast.LShift: self.b.shl,
            ast.RShift: self.b.ashr, ast.BitAnd: self.b.and_, ast.BitOr: self.b.or_, ast.BitXor: self.b.xor,
        }  # fmt: skip
        if type(op) in simple:
            return simple[type(op)](a, b)
        if isinstance(op, ast.FloorDiv | ast.Mod):
            remainder = self.b.srem(a, b)  # has the sign of a; Python's has that of b
            wrong = self.b.and_(
                self.b.icmp_signed("!=", remainder, self.constant(0)),
                self.b.icmp_signed("<", self.b.xor(remainder, b), self.constant(0)),
            )
            if isinstance(op, ast.Mod):
                return self.b.select(wrong, self.b.add(remainder, b), remainder)
            quotient = self.b.sdiv(a, b)
            return self.b.select(wrong, self.b.sub(quotient, self.constant(1)), quotient)
        raise TypeError(f"{self.kernel.__name__}: {type(op).__name__} is not supported in a kernel")

    def call(self, node: ast.Call, name: str, arguments: list[ast.expr]) -> Any:
        target = self.globals.get(name)
        if isinstance(target, Kernel):
            return self.b.call(self.declare(target), self.given(node, target, arguments))
        if self.hides(name) or len(arguments) < {"min": 2, "max": 2}.get(name, 1):
            raise self.unknown(node)
        values = [self.value(argument) for argument in arguments]
        if name in ("min", "max"):
            result = values[0]
            for other in values[1:]:
                better = self.b.icmp_signed("<" if name == "min" else ">", other, result)
                result = self.b.select(better, other, result)
            return result
        if name == "int" and len(values) == 1:
            return values[0]
        if name == "abs" and len(values) == 1:
            negative = self.b.icmp_signed("<", values[0], self.constant(0))
            return self.b.select(negative, self.b.neg(values[0]), values[0])
        raise self.unknown(node)

    def given(self, node: ast.Call, target: Kernel, arguments: list[ast.expr]) -> list[Any]:
        """The arguments of a call of another kernel; no array may be given twice."""
        arrays = [ast.unparse(a) for a, kind in zip(arguments, target.kinds, strict=False) if kind != "Int"]
        fits = all(
            a in self.arrays and self.arrays[a][1] == k
            for a, k in zip(arrays, (k for k in target.kinds if k != "Int"), strict=False)
        )
        if len(arguments) != len(target.kinds) or len(set(arrays)) < len(arrays) or not fits:
            raise self.unknown(node)
        pairs = zip(arguments, target.kinds, strict=True)
        return [self.value(a) if kind == "Int" else self.arrays[ast.unparse(a)][0] for a, kind in pairs]

    def hides(self, name: str) -> bool:
        """Whether a builtin's name means something else here."""
        return name in self.slots or name in self.arrays or name in self.globals

    def element(self, node: ast.expr) -> tuple[Any, str]:
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=at) if name in self.arrays:
                if isinstance(at, ast.UnaryOp) and isinstance(at.operand, ast.Constant):
                    raise self.unknown(node)  # from the end: the length is not known
                pointer, kind = self.arrays[name]
                return self.b.gep(pointer, [self.value(at)]), kind
        raise self.unknown(node)

    def load(self, pointer: Any, kind: str) -> Any:
        value = self.b.load(pointer)
        if _ARRAYS[kind][1] == 64:
            return value
        return self.b.zext(value, self.i64) if _ARRAYS[kind][0][0] == "u" else self.b.sext(value, self.i64)

    def unknown(self, node: ast.AST) -> TypeError:
        return TypeError(f"{self.kernel.__name__}: {ast.unparse(node)!r} is not supported in a kernel")


def _is_condition(node: ast.expr) -> bool:
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return is_not or isinstance(node, ast.Compare | ast.BoolOp)
