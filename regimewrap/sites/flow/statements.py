"""What statements do to the names that the tracer knows."""

from __future__ import annotations

import ast
import operator
from typing import Any

from torch import fx

from regimewrap.sites.flow.expressions import Expressions
from regimewrap.sites.flow.writing import KNOWN, PLAIN, TURNS, Bound, Env
from regimewrap.sites.read.code import UNKNOWN


class Statements(Expressions):
    """Reads statements: branches on what is not known both ways, loops over known things in turn."""

    def _block(self, statements: list[ast.stmt], env: Env) -> bool:
        """Read statements in order; return ``True`` if the code after them is certainly not reached."""
        return any(self._statement(each, env) for each in statements)

    def _statement(self, node: ast.stmt, env: Env) -> bool:
        if isinstance(node, ast.Return):
            self._returned[-1].append(None if node.value is None else self._value(node.value, env))
            return True
        if isinstance(node, ast.If):
            return self._if(node, env)
        if isinstance(node, ast.For | ast.AsyncFor):
            for item in self._items(self._value(node.iter, env))[:TURNS]:
                self._assign(node.target, item, env)
                if item is UNKNOWN:
                    self._branches([node.body, []], env)
                else:
                    self._block(node.body, env)
            self._block(node.orelse, env)
            return False
        if isinstance(node, ast.While):
            test = self._value(node.test, env)
            if not (type(test) in PLAIN and not test):
                self._branches([node.body, []], env)
            return False
        if isinstance(node, ast.With | ast.AsyncWith):
            for each in node.items:
                value = self._value(each.context_expr, env)
                if each.optional_vars is not None:
                    self._assign(each.optional_vars, value, env)
            return self._block(node.body, env)
        if isinstance(node, ast.Try):
            over = self._branches([[*node.body, *node.orelse], *(each.body for each in node.handlers)], env)
            return self._block(node.finalbody, env) or over
        if isinstance(node, ast.Match):
            self._value(node.subject, env)
            return self._branches([*(each.body for each in node.cases), []], env)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            env[node.name] = Bound(node, env=env)
        elif isinstance(node, ast.Assign):
            value = self._value(node.value, env)
            for target in node.targets:
                self._assign(target, value, env)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, self._value(node.value, env), env)
        elif isinstance(node, ast.AugAssign):
            load = ast.copy_location(ast.BinOp(node.target, node.op, node.value), node.value)
            self._assign(node.target, self._value(load, env), env)
        elif isinstance(node, ast.Expr):
            value = self._value(node.value, env)
            self._in_place(node.value, value, env)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                env[(alias.asname or alias.name).partition(".")[0]] = UNKNOWN
        return isinstance(node, ast.Raise | ast.Continue | ast.Break)

    def _in_place(self, node: ast.expr, value: Any, env: Env) -> None:
        """``x.relu_()`` and ``self.relu(x)`` on lines of their own: what follows may see their result as ``x``."""
        if isinstance(value, fx.Node) and value.op in ("call_method", "call_module", "call_function"):
            first = next(iter(value.args), None)
            named = [name for name, held in env.items() if isinstance(first, fx.Node) and held is first]
            inplace = value.op != "call_method" or str(value.target).endswith("_")
            for name in named if inplace and isinstance(node, ast.Call) else ():
                env[name] = value

    def _if(self, node: ast.If, env: Env) -> bool:
        test = self._value(node.test, env)
        if type(test) in KNOWN:
            return self._block(node.body if test else node.orelse, env)
        return self._branches([node.body, node.orelse], env)

    def _branches(self, blocks: list[list[ast.stmt]], env: Env) -> bool:
        """Read alternatives from the same start, and join their results; return ``True`` if none goes on."""
        ends: list[Env] = []
        for block in blocks:
            inner = env.copy()
            if not self._block(block, inner):
                ends.append(inner)
        for name in dict.fromkeys(name for each in ends for name in each):
            env[name] = self._either([each[name] for each in ends if name in each])
        return not ends

    def _assign(self, target: ast.expr, value: Any, env: Env) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            many = list(value) if type(value) in (list, tuple) and len(value) == len(target.elts) else None
            for place, each in enumerate(target.elts):
                inner = each.value if isinstance(each, ast.Starred) else each
                if many is not None:
                    part = many[place]
                elif isinstance(value, fx.Node):
                    part = self._node("call_function", operator.getitem, (value, place))
                else:
                    part = UNKNOWN
                self._assign(inner, part, env)
        elif isinstance(target, ast.Subscript):
            base, key = self._value(target.value, env), self._value(target.slice, env)
            if (type(base) is dict and type(key) in PLAIN) or (
                type(base) is list and type(key) is int and -len(base) <= key < len(base)
            ):
                base[key] = value
            elif isinstance(base, fx.Node) and isinstance(target.value, ast.Name):
                env[target.value.id] = self._node("call_function", operator.setitem, (base, key, value))
