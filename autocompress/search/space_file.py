"""Where search spaces come from: built-in files, a user's YAML file, a mapping."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from autocompress.errors import SpaceError
from autocompress.plan import LayerSpec
from autocompress.search.space import Space
from autocompress.search.space_rules import TOP_KEYS, At, Errors, build, meant, shown

MAX_FILE_BYTES = 1_000_000


def space_folder() -> Path:
    """The folder of the built-in spaces: inside the installed package, else the checkout's."""
    inside = Path(__file__).parents[1] / "search_spaces"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "search_spaces"


def available() -> dict[str, str]:
    """The built-in spaces: name -> one line of description."""
    return {path.stem: _read_file(path).get("description", "") for path in sorted(space_folder().glob("*.yaml"))}


def load_space(
    source: str | Path | Mapping[str, Any] | None, specs: Sequence[LayerSpec], errors: Errors | None = None
) -> Space:
    """The search space for a model's layers.

    `source` is a YAML file, the name of a built-in space, a mapping of the same form, or None for
    the built-in `default`, whose rules go by each layer's kind and size and so fit any model. `errors`
    (`Workbench.rank_errors`) is what ranks by tolerance are looked up in.
    Raises SpaceError, in one line naming file, key, value and what is allowed.
    """
    name, file, read = read_space(source)
    if not specs:
        raise SpaceError(f"{file}: the model has no layer to compress")
    return build(name, At(file), read, specs, errors)


def read_space(source: str | Path | Mapping[str, Any] | None) -> tuple[str, str, Mapping[str, Any]]:
    """A space's name, what messages call it, and what it holds, of which only a model tells whether it makes sense.

    `source` and errors as in `load_space`.
    """
    if isinstance(source, Mapping):
        return "custom", "search space", source
    path = _find(source if source is not None else "default")
    file = f"built-in space {path.stem!r}" if path.parent == space_folder() else str(path)
    return path.stem, file, _read_file(path)


def _find(source: str | Path) -> Path:
    built_in = {path.stem: path for path in space_folder().glob("*.yaml")}
    if isinstance(source, str) and source in built_in:
        return built_in[source]
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, Path) or path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        raise SpaceError(f"search space {str(source)!r}: there is no such file")
    allowed = f"a YAML file, or one of {', '.join(sorted(built_in))}"
    raise SpaceError(f"search space is {source!r}, allowed: {allowed}{meant(source, built_in)}")


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SpaceError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_FILE_BYTES:
        raise SpaceError(f"{path}: holds more than {MAX_FILE_BYTES:,} bytes, allowed: up to that many")
    try:
        read = yaml.load(raw.decode("utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise SpaceError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SpaceError(f"{path}: {where}{' '.join(str(error.problem).split())}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpaceError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise SpaceError(f"{path}: is nested too deeply") from None
    if not isinstance(read, Mapping):
        raise SpaceError(f"{path}: is {shown(read)}, allowed: a mapping with the keys {', '.join(TOP_KEYS)}")
    return read


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses what PyYAML takes silently: keys given twice, and aliases.

    Plain scalars are read as in YAML 1.2: 3e-4 is a number, `on` a text. What stands under
    `match` and `group` is always a text, since layers may be called 0 or 1.10.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (filled below; PyYAML's own name)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            peek: Any = self.peek_event
            event = peek()
            problem = (
                f'alias *{event.anchor} is not allowed; a pattern that begins with * needs quotes: "*{event.anchor}"'
            )
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in ("match", "group"):
                _as_text(value)
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key {key.value!r} is given twice, allowed: once"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _as_text(node: Any) -> None:
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if isinstance(item, yaml.ScalarNode) and item.tag != _TAG + "null":
            item.tag = _TAG + "str"


_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": _FLOAT,
}.items():
    _Loader.add_implicit_resolver(_TAG + _tag, re.compile(rf"^(?:{_pattern})$"), None)
_Loader.add_constructor(_TAG + "int", lambda _, node: int(node.value))
