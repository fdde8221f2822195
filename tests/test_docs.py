"""The documentation: its commands are understood, its links lead somewhere, what it quotes is said.

A block of code that is no command of today is marked by a comment before it that says why:
`<!-- not checked: the output of ... -->`.
"""

import dataclasses
import json
import re
import shlex
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from minbert.data.errors import UserError
from minbert.launch.manual import ACTIONS, COMMANDS, Help
from minbert.launch.options import parse, run_option_types
from minbert.launch.words import read_options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"options", "methods", "recipes", "files"}  # pages of docs/hooks.py, in reference/
OTHERS = {"head", "container-image", "kills", "damages"}  # options of ray, srun, and benchmarks/chaos.py
OTHERS |= {"only", "sides", "profile"}  # of benchmarks/performance.py
BLOCK = re.compile(r"(<!-- not checked: [^>]+ -->\n+)?^```(\w*)\n(.*?)^```$", re.M | re.S)
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(text: str) -> list[str]:
    """The lines of a page's blocks that call minbert, joined where they go on, without prompts and comments."""
    found = []
    for unchecked, language, block in BLOCK.findall(text):
        if unchecked or language not in ("", "sh"):
            continue
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if assigned := re.fullmatch(r'([A-Z]+)="(.*)"', line):
                variables[assigned[1]] = assigned[2]
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            if line.startswith("minbert "):
                found.append(line)
    return found


def words_of(line: str) -> list[str]:
    """What the shell would give to the program: up to a pipe, a redirection or another command."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    end = next((at for at, word in enumerate(words) if set(word) <= set("|&;<>()")), len(words))
    return [word for word in words[1:end] if word != "..."]


@lru_cache
def options_of(command: str, *action: str) -> type:
    try:
        import_module(COMMANDS[command][0]).main([*action, "--help"])
    except Help as asked:
        return asked.kind
    raise AssertionError(command)


def understand(words: list[str]) -> None:
    """Raises UserError for a command that minbert would refuse before it looks at files."""
    command, *rest = words
    if command not in COMMANDS:
        raise UserError(f"there is no command {command}")
    action = rest[:1] if command in ACTIONS else []
    kind = options_of(command, *action)
    rest = rest[len(action) :]
    if dataclasses.is_dataclass(kind):
        parse(kind, rest, command)
    else:
        read_options(_types(kind), rest, command)


def _types(model: type[BaseModel]) -> dict:
    """Every option of a model and of the groups in it, by their own names."""
    types: dict = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            types |= _types(inner)
        else:
            types[name] = bool if inner is bool else field.rebuild_annotation()
    return types | {name: kind for name, kind in run_option_types().items() if name in types}


@names
def test_commands_are_understood(page):
    for line in commands(page.read_text()):
        if line in ("minbert --help", "minbert --version"):
            continue
        try:
            understand(words_of(line))
        except UserError as error:
            pytest.fail(f"{page.name}: {line}\n{error}")


def test_a_command_that_is_wrong_is_noticed():
    wrong = "```sh\nminbert train --modle tiny \\\n    --lr 1\n```\n"
    text = wrong + "<!-- not checked: of old -->\n\n```sh\nminbert old\n```\n"
    (line,) = commands(text)
    with pytest.raises(UserError, match="--model"):
        understand(words_of(line))
    understand(words_of('minbert predict RUN --text "a > b" | head'))


@names
def test_options_that_are_named_in_the_text_are_there(page):
    """`--name` in a sentence is an option of one of the commands."""
    known = {"help", "version", *run_option_types()}
    for command in COMMANDS:
        for action in ACTIONS.get(command, ("",)):
            kind = options_of(command, *filter(None, [action]))
            fields = _types(kind) if not dataclasses.is_dataclass(kind) else kind.__dataclass_fields__
            known |= set(fields)
    text = BLOCK.sub("", page.read_text())
    told = {
        option
        for span in re.findall(r"`([^`]+)`", text)
        if span.startswith(("--", "minbert "))
        for option in re.findall(r"(?<![\w-])--([a-z][\w-]*)", span)
    }
    assert {option for option in told if option.replace("-", "_") not in known} <= OTHERS


@names
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        if re.fullmatch(r"reference/(\w+)\.md", path):
            assert path.removeprefix("reference/").removesuffix(".md") in GENERATED, target
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", file.read_text()), re.M)
            assert anchor in {_slug(title) for title in titles}, f"{page.name}: {target}"


def _slug(title: str) -> str:
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "").lower()).strip())


def test_every_page_is_in_the_site():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/]+\.md", json.dumps(config["nav"])))
    pages = {page.name for page in PAGES if page.parent.name == "docs"} | {f"reference/{name}.md" for name in GENERATED}
    assert listed == pages


def test_python_in_pages_compiles():
    for page in PAGES:
        for _, language, block in BLOCK.findall(page.read_text()):
            if language == "python":
                compile(block, page.name, "exec")


def test_messages_in_troubleshooting_are_said():
    """Each piece between dots and names in capitals stands in the code."""
    sources = [
        path.read_text()
        for room in ("data", "trainer", "launch", "slurm", "tuning")
        for path in (ROOT / room).rglob("*.py")
    ]
    said = re.sub(r"\"\s*\n\s*f?\"", "", "\n".join(sources))
    said = re.sub(r"\{[^{}]*\}", "{}", said)
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    pieces = [
        piece.strip(" :,'")
        for row in rows
        for quoted in re.findall(r"`([^`]+)`", row)
        if not quoted.startswith("--")
        for piece in re.split(r"\.\.\.|\b[A-Z]+\b|\b\d+\b|{}", quoted)
    ]
    missing = [piece for piece in pieces if len(piece) > 4 and piece not in said]
    assert rows
    assert missing == []
