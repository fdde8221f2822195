"""Reading small files: configurations, manifests, records, logs.

Whatever stands there may have been edited, cut off, or put there by somebody else. A file is read within bounds, never
waited for, and what is wrong with it is said with its name.
"""

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from minbert.data.errors import DataError, UserError, shown

LARGEST = 1 << 30  # bytes of a log, which grows with the run
LARGEST_YAML = 1 << 20  # of a configuration; PyYAML reads about 100 kB a second
_PIECE = 1 << 20  # bytes that are read at a time
MOST_NODES = 100_000  # values that a configuration may stand for, aliases written out


def read_small(path: Path, limit: int | None = LARGEST) -> bytes:
    """The bytes of a regular file. Raises OSError, also for a pipe, which might never end, and beyond `limit` bytes.

    Under /dev a pipe is welcome: `--config <(command)` is one that the shell made.
    """
    from_shell = str(path).startswith("/dev/")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if from_shell else os.O_NONBLOCK))
    except ValueError:
        raise OSError(errno.EINVAL, "a path cannot hold a NUL byte", str(path)) from None
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file", str(path))
        if not stat.S_ISREG(kind) and not from_shell:
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = bytearray()
            while piece := file.read(_PIECE):  # not limit + 1 at once, for which Python would reserve as much memory
                content += piece
                if limit is not None and len(content) > limit:
                    raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    finally:
        os.close(descriptor)
    return bytes(content)


def decode(content: bytes, path: Path) -> str:
    """UTF-8 text, with or without the byte order mark that spreadsheets write. Raises DataError with the place."""
    try:
        return content.decode().removeprefix("\ufeff")  # not utf-8-sig, whose errors count from behind the mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        guess = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise DataError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} (offset {error.start}) is not UTF-8. Convert the file, "
            f"for example with: iconv -f {guess} -t UTF-8 {path.name} > converted{path.suffix}"
        ) from None


def read_text(path: Path, limit: int | None = LARGEST) -> str:
    """Raises DataError, and FileNotFoundError where there is no file."""
    try:
        return decode(read_small(path, limit), path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError, also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, and FileNotFoundError where there is no file."""
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {shown(content)}")
    return content


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a log, one a line and each with its `step`. What else stands there is left out: a kill can tear a
    line, and others may write into the file."""
    try:
        text = read_small(path).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    records = []
    for line in text.split("\n"):
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises UserError, also for a key that is given twice."""
    try:
        text = read_text(path, LARGEST_YAML)
    except FileNotFoundError:
        raise UserError(f"cannot read configuration {path}: {os.strerror(errno.ENOENT)}") from None
    try:
        raw = yaml.load(text, PlainLoader)
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError) as error:  # the latter two: `!!int abc`
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict | None) or not all(isinstance(key, str) for key in raw or {}):
        raise UserError(f"{path} must hold `key: value` lines")
    return raw or {}


class PlainLoader(yaml.SafeLoader):
    """YAML without its surprises: `8:00:00`, `2024-01-01`, `no` and `0123` are the words that they look like, no key
    is given twice, and aliases do not multiply without end."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _weigh(node, {})
        return node


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})\\Z"), list(_first))


def _weigh(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for. Raises YAMLError beyond all bounds, and for a key that is given twice."""
    if id(node) in sizes:
        size = sizes[id(node)]
    else:
        sizes[id(node)] = MOST_NODES + 1  # a node that holds itself meets this
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode):
                    if key.value in lines:
                        before = lines[key.value]
                        raise yaml.YAMLError(f"line {line}: {shown(key.value)} was given before, in line {before}")
                    lines[key.value] = line
            children = [part for pair in node.value for part in pair]
        size = sizes[id(node)] = 1 + sum(_weigh(child, sizes) for child in children)
    if size > MOST_NODES:
        raise yaml.YAMLError("its aliases stand for too much")
    return size
