"""Reads the YAML configs of Detectron2 projects as Detectron2 does, except that nothing in them is ever run.

A file may name others in ``_BASE_``, over which its keys are laid; the result is laid over the defaults of Detectron2 and MaskFormer
(``official_defaults.json``, recorded from the official code by ``python -m parity.record_defaults``). Merging, the literals inside
strings (``"(640, 640)"``) and the strictness about types and unknown keys are those of fvcore and yacs. Stricter: None takes no other
value's place, items have the type of the default's, numbers are finite, and what nothing here could use is refused (:data:`LIMITS`).
Detectron2 evaluates Python that a file holds; here a parser reads the one form that the official files use,
``!!python/object/apply:eval`` of a list over a range, and refuses all others. Why: docs/decisions/0009-official-yaml-configs.md.
"""

from __future__ import annotations

import ast
import collections
import difflib
import importlib.resources
import json
import math
import operator
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tfmaskformer.config import ConfigError

BASE = "_BASE_"
MAX_FILE_BYTES = 100_000
MAX_FILES = 50
MAX_NODES = 10_000
"""Values in a file after its aliases are replaced by what they stand for; the largest official file has 79."""
MAX_FLOW_DEPTH = 20
"""Of brackets in brackets, for which PyYAML's scanner takes quadratic time."""
MAX_LITERAL_CHARACTERS = 1_000
MAX_EXPRESSION_CHARACTERS = 200
MAX_RANGE = 1_000
MAX_NUMBER = 10**9

Tree = dict[str, Any]


_MAX_SIDE_PX = 2**15
"""Of an image padded to it, which has 3 GB."""


def _names(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "DATASETS.TEST": (_names, "names of data sets"),
    "DATASETS.TRAIN": (_names, "names of data sets"),
    "INPUT.CROP.SIZE": (lambda size: len(size) == 2, "two numbers"),
    "INPUT.MAX_SIZE_TEST": (lambda size: 0 < size < 2**31, "a size in px, below 2**31"),
    "INPUT.MIN_SIZE_TEST": (lambda size: 0 <= size < 2**31, "a size in px, below 2**31"),
    "INPUT.SIZE_DIVISIBILITY": (lambda side: side <= _MAX_SIDE_PX, f"a size in px, {_MAX_SIDE_PX} at most"),
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": (lambda side: side <= _MAX_SIDE_PX, f"a size in px, {_MAX_SIDE_PX} at most"),
    "MODEL.PIXEL_MEAN": (lambda mean: len(mean) == 3, "three numbers"),
    "MODEL.PIXEL_STD": (lambda std: len(std) == 3 and min(std) > 0, "three numbers above 0"),
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": (lambda value: -(2**31) <= value < 2**31, "an integer of 32 bits"),
    "SEED": (lambda seed: seed < 2**32, "a number below 2**32; below 0 is upstream's word for any"),
    "VERSION": (lambda version: version == 2, "2, Detectron2's latest"),
}
"""What the type of a value does not tell: key → its test, and what is expected. Recipe, mapper and model have limits of their own."""

_TYPES = {tuple, list, str, int, float, bool, type(None)}
_ITEMS_TOO: dict[type, set[type]] = {float: {int}, list: {tuple}, tuple: {list}}
"""What an item may be as well: official files have whole numbers where the default has fractions."""

_EVAL_TAG = "tag:yaml.org,2002:python/object/apply:eval"
_EXPECTED = "expected numbers with + - * /, int(…) and one loop: [int(x * 0.1 * 640) for x in range(5, 21)]"


def read_tree(path: str | os.PathLike[str]) -> Tree:
    """The whole config of an official YAML file: its keys, those of its bases, and the defaults, as nested dicts.

    What ``get_cfg()``, ``add_deeplab_config``, ``add_mask_former_config`` and ``merge_from_file`` give in the official code.

    Raises:
        ConfigError: no such file, no YAML, Python other than a list over a range, an unknown key, or a value of another type than
            the default's or beyond :data:`LIMITS`; the message names the file and the key.
    """
    files: list[Path] = []
    tree = defaults()
    _merge(_load(Path(path), (), files), tree, defaults(), f"config '{path}'", "")
    return tree


def defaults() -> Tree:
    """The defaults alone: a new copy."""
    return _decoded_tree(_packaged("official_defaults.json")["defaults"])


def official_tree(path: str) -> Tree:
    """What :func:`read_tree` makes of one of the official files, which need not be there: as recorded.

    Args:
        path: in the official repository, ``configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml``.
    """
    tree = defaults()
    override(tree, [part for item in _packaged("official_configs.json")["configs"][path].items() for part in item])
    return tree


def override(tree: Tree, options: Sequence[Any]) -> None:
    """Changes values of a whole config in place, as Detectron2's ``merge_from_list``: ``["SOLVER.BASE_LR", "1e-4", …]``.

    Raises:
        ConfigError: a key without a value, an unknown key, or a value of another type than the default's or beyond :data:`LIMITS`.
    """
    if len(options) % 2:
        raise ConfigError(f"options: '{options[-1]}' has no value, expected pairs of a key and a value")
    official = defaults()
    for key, value in zip(options[::2], options[1::2], strict=True):
        *parents, last = key.split(".")
        values = {last: value}
        for parent in reversed(parents):
            values = {parent: values}
        _merge(values, tree, official, "options", "")


def dump(tree: Tree) -> str:
    """A whole config as YAML; :func:`read_tree` of the text, and the official code's ``merge_from_file``, lead back."""

    def plain(value: Any) -> Any:  # tuples are text, as in the official files
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return repr(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(tree), sort_keys=True, allow_unicode=True)


def _packaged(name: str) -> Any:
    return json.loads(importlib.resources.files("tfmaskformer").joinpath(name).read_text(encoding="utf-8"))


def decode(value: Any) -> Any:
    """What a value means: text that is a Python literal stands for that literal (yacs ``CfgNode._decode_cfg_value``).

    >>> decode("(640, 640)"), decode("1e-6"), decode("RGB"), decode([1, "2"])
    ((640, 640), 1e-06, 'RGB', [1, '2'])

    Raises:
        ValueError: text of more than ``MAX_LITERAL_CHARACTERS`` characters.
    """
    if not isinstance(value, str):
        return value
    if len(value) > MAX_LITERAL_CHARACTERS:
        raise ValueError(f"text of {len(value)} characters, expected at most {MAX_LITERAL_CHARACTERS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's compiler, about text such as "1is"
            return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def evaluate(expression: str) -> list[int | float]:
    """The list that a comprehension over a range describes, computed by walking its syntax tree; nothing is handed to ``eval``.

    >>> evaluate("[int(x * 0.1 * 640) for x in range(5, 9)]")
    [320, 384, 448, 512]

    Raises:
        ValueError: anything else than numbers, ``+ - * /``, ``int`` and one loop over a range; says which part.
    """
    if len(expression) > MAX_EXPRESSION_CHARACTERS:
        raise ValueError(f"an expression of {len(expression)} characters, expected at most {MAX_EXPRESSION_CHARACTERS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"no Python expression ({type(error).__name__})") from None
    match body:
        case ast.ListComp(elt=element, generators=[ast.comprehension(target=ast.Name(id=variable), iter=over, ifs=[], is_async=0)]):
            return [_number(element, {variable: index}) for index in _range(over)]
    raise ValueError(_told(body))


def _range(node: ast.expr) -> range:
    match node:
        case ast.Call(func=ast.Name(id="range"), args=[_, *_] as arguments, keywords=[]) if len(arguments) <= 3:
            bounds = [_number(argument, {}) for argument in arguments]
            if not all(isinstance(bound, int) for bound in bounds) or bounds[2:] == [0]:
                raise ValueError(f"the range '{ast.unparse(node)}', expected whole numbers and a step that is not 0")
            over = range(*map(int, bounds))
            if len(over) > MAX_RANGE:
                raise ValueError(f"the range '{ast.unparse(node)}' with {len(over)} items, expected at most {MAX_RANGE}")
            return over
    raise ValueError(_told(node))


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _number(node: ast.expr, variables: Mapping[str, int]) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            result = value
        case ast.Name(id=name) if name in variables:
            result = variables[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = -_number(operand, variables)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            values = _number(left, variables), _number(right, variables)
            if isinstance(op, ast.Div) and values[1] == 0:
                raise ValueError(f"a division by zero in '{ast.unparse(node)}'")
            result = _OPERATORS[type(op)](*values)
        case ast.Call(func=ast.Name(id="int"), args=[argument], keywords=[]):
            result = int(_number(argument, variables))
        case _:
            raise ValueError(_told(node))
    if not math.isfinite(result) or abs(result) > MAX_NUMBER:
        raise ValueError(f"a number beyond ±{MAX_NUMBER:.0e}")
    return result


def _told(node: ast.expr) -> str:
    return f"'{ast.unparse(node)[:80]}', which is not read"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, and :func:`evaluate` for the one Python tag that official files have. A key that occurs twice is refused."""

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level >= MAX_FLOW_DEPTH:
            raise yaml.scanner.ScannerError(None, None, f"brackets are nested more than {MAX_FLOW_DEPTH} deep", self.get_mark())
        super().fetch_flow_collection_start(token)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = collections.Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        twice = [key for key, times in keys.items() if times > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} occurs {keys[twice[0]]} times", node.start_mark)
        return super().construct_mapping(node, deep=deep)

    def evaluated(self, node: yaml.Node) -> list[int | float]:
        match node:
            case yaml.SequenceNode(value=[yaml.ScalarNode(value=str() as expression)]):
                try:
                    return evaluate(expression)
                except ValueError as error:
                    problem = f"Python is not run, and this holds {error}; {_EXPECTED}"
            case _:
                problem = f"Python is not run; {_EXPECTED}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def refused(self, suffix: str, node: yaml.Node) -> Any:
        problem = f"'!!python/{suffix}' is not read: Python in a config is not run; write the value itself"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_constructor(_EVAL_TAG, _Loader.evaluated)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _Loader.refused)


def _load(path: Path, below: tuple[Path, ...], files: list[Path]) -> Tree:
    """The keys of a file and of its bases. ``below``: the files whose bases are being read; ``files``: all that were read."""
    named = f"config '{path}'" + (f", the base of '{below[-1]}'" if below else "")
    files.append(path)
    if len(files) > MAX_FILES:
        raise ConfigError(f"config '{files[0]}': more than {MAX_FILES} bases")
    values = _parse(_text(path, named), named)
    if path.resolve() in [file.resolve() for file in below]:
        raise ConfigError(f"{named}: it is its own base: {' → '.join(file.name for file in (*below, path))}")
    bases = values.pop(BASE, [])
    merged: Tree = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "://" in base:
            raise ConfigError(f"{named}: '{BASE}' is {_short(base)}, expected the path of a file, or a list of them")
        _overlay(_load(path.parent / os.path.expanduser(base), (*below, path), files), merged, named, "")
    _overlay(values, merged, named, "")
    return merged


def _text(path: Path, named: str) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{named} is a directory, expected a YAML file")
        if not path.is_file():
            raise ConfigError(f"{named} does not exist, or is no regular file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{named} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{named} has more than {MAX_FILE_BYTES} bytes; is it a config?")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{named} is no UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None


def _parse(text: str, named: str) -> Tree:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{named} is empty")
        _check_size(node, named)
        values = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{named}{where}: {getattr(error, 'problem', None) or getattr(error, 'reason', error)}") from None
    except RecursionError:
        raise ConfigError(f"{named}: it is nested too deeply") from None
    except (ValueError, TypeError, OverflowError, AttributeError) as error:  # PyYAML on dates, numbers and keys that are none
        raise ConfigError(f"{named}: a value that YAML does not allow: {str(error)[:200]}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(values, dict):
        raise ConfigError(f"{named} holds {_short(values)}, expected keys such as 'MODEL'")
    return values


def _check_size(root: yaml.Node, named: str) -> None:
    """Refuses aliases that lead into themselves or multiply to more than ``MAX_NODES`` values; looks at each node once."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_NODES + 1  # until it is known: met again meanwhile, it contains itself
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
            sizes[id(node)] = 1 + sum(sum(map(size, child)) if isinstance(child, tuple) else size(child) for child in children)
        return sizes[id(node)]

    if size(root) > MAX_NODES:
        raise ConfigError(f"{named}: more than {MAX_NODES} values, counting what its aliases stand for; is it a config?")


def _overlay(values: Tree, base: Tree, named: str, where: str) -> None:
    """Lays a file over its base (fvcore ``load_yaml_with_base``)."""
    for key, value in values.items():
        if isinstance(value, dict) and key in base:
            if not isinstance(base[key], dict):
                raise ConfigError(f"{named}: '{where}{key}' has keys, but is {_short(base[key])} in the base")
            _overlay(value, base[key], named, f"{where}{key}.")
        else:
            base[key] = value


def _merge(values: Tree, tree: Tree, official: Tree, named: str, where: str) -> None:
    """Lays a file over a whole config; the defaults tell the keys and their types (yacs ``_merge_a_into_b``)."""
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in official:
            nearest = difflib.get_close_matches(str(key), official, n=3, cutoff=0.6)
            raise ConfigError(
                f"{named}: unknown key '{name}'" + (f"; nearest: {', '.join(where + near for near in nearest)}" if nearest else "")
            )
        default = official[key]
        if isinstance(value, dict) and isinstance(default, dict):
            _merge(value, tree[key], default, named, f"{name}.")
            continue
        try:
            decoded = decode(value)
        except ValueError as error:
            raise ConfigError(f"{named}: '{name}' is {error}") from None
        if isinstance(default, list | tuple) and isinstance(decoded, list | tuple):
            decoded = type(default)(decoded)
        within, limit = LIMITS.get(name, (lambda _: True, ""))
        expected = ""
        if isinstance(default, dict) or isinstance(value, dict) or not _fits(decoded, default):
            expected = f"{_kind(default)} as in the default {_short(default)}"
        elif not _finite(decoded):
            expected = "finite numbers that fit in 64 bits"
        elif not within(decoded):
            expected = limit
        if expected:
            raise ConfigError(f"{named}: '{name}' is {_short(decoded)}, expected {expected}")
        tree[key] = decoded


def _fits(value: Any, default: Any, too: Collection[type] = ()) -> bool:
    """Whether a value has the type of the default, or one of ``too``, and its items that of the default's; where there is none, any."""
    if type(value) not in (_TYPES if default is None else {type(default), *too}):
        return False
    if not isinstance(value, list | tuple):
        return True
    item = default[0] if default else None
    return all(_fits(each, item, _ITEMS_TOO.get(type(item), ())) for each in value)


def _finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not isinstance(value, float) or math.isfinite(value)


def _decoded_tree(values: Tree) -> Tree:
    return {key: _decoded_tree(value) if isinstance(value, dict) else decode(value) for key, value in values.items()}


def _kind(value: Any) -> str:
    name = {dict: "keys", type(None): "a value"}.get(type(value), type(value).__name__)
    return f"{name} of {_kind(value[0])}" if isinstance(value, list | tuple) and value else name


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"keys ({', '.join(map(str, list(value)[:3]))}, …)"
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
