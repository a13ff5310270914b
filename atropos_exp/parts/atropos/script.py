"""What the source of an environment says about itself, found without running it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """What `config_init` of an environment returns, as far as it can be read."""

    wants_server_list: bool
    """Whether it ignores or refuses --openai flags: atroposlib drops the base URL of a single APIServerConfig (it asks
    at localhost:9004 to 9007 instead), and refuses the flags where there are several."""
    max_token_length: int | None  # its own limit for a sequence, prompt included


def read_script(path: Path) -> Script:
    """Read the file at `path`; what cannot be read says nothing."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return Script(wants_server_list=False, max_token_length=None)
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "config_init"
    ]
    if not functions:  # BaseEnv's own returns a ServerBaseline, which has no address at all
        return Script(wants_server_list=_derives_from_base(tree), max_token_length=None)
    lengths = [length for function in functions for length in _lengths(function)]
    return Script(
        wants_server_list=any(_returns_no_single_list(function) for function in functions),
        max_token_length=max(lengths, default=None),
    )


def _derives_from_base(tree: ast.Module) -> bool:
    bases = [base for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases]
    return any(_name(base) == "BaseEnv" for base in bases)


def _returns_no_single_list(function: ast.AST) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
            servers = _value_of(node.value.elts[1], function)
            if isinstance(servers, ast.List) and len(servers.elts) > 1:
                return True
            if isinstance(servers, ast.Call) and _name(servers.func) in ("APIServerConfig", "ServerBaseline"):
                return True
    return False


def _value_of(node: ast.expr, function: ast.AST) -> ast.expr:
    """What a name was last given in `function`; any other expression is itself."""
    if not isinstance(node, ast.Name):
        return node
    found: ast.expr = node
    for statement in ast.walk(function):
        if isinstance(statement, ast.Assign):
            targets: list[ast.expr] = statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets = [statement.target]
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == node.id for target in targets):
            assert statement.value is not None
            found = statement.value
    return found


def _lengths(function: ast.AST) -> Iterator[int]:
    for node in ast.walk(function):
        if isinstance(node, ast.keyword) and node.arg == "max_token_length" and isinstance(node.value, ast.Constant):
            value = node.value.value
            if isinstance(value, int):
                yield value


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
