"""What the site has beside the files in docs/: a reference that is made of the code, by mkdocs as it builds."""

import re
from argparse import Action, ArgumentParser
from collections.abc import Iterator

from mkdocs.structure.files import File

from minbert.launch.manual import ACTIONS, COMMANDS, parser_of
from minbert.trainer.export import folder as exported
from minbert.trainer.recipe import read_recipe, recipes
from minbert.trainer.run import folder as run_folder
from minbert.trainer.surgery.methods import METHODS


def on_files(files, config):
    pages = {"options": _options(), "methods": _methods(), "recipes": _recipes(), "files": _files()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """What lies outside docs/ is named, not linked: the site does not have it. Pages are called by their titles."""
    if not page.url.startswith("reference/"):
        markdown = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2` in the sources)", markdown)
    titles = {path: title for part in config["nav"] for title, path in _pages(part)}

    def called(link: re.Match[str]) -> str:
        return f"[{titles.get(link[1], link[1])}]({link[2]})"

    markdown = re.sub(r"\[(?:docs/)?([\w/]+\.md)\]\(([^)]+)\)", called, markdown)
    return re.sub(r"(?m)^\|.*$", lambda row: row[0].replace(" ± ", "\u00a0±\u00a0"), markdown)


def _pages(part: dict) -> Iterator[tuple[str, str]]:
    for title, inside in part.items():
        yield from [(title, inside)] if isinstance(inside, str) else (page for each in inside for page in _pages(each))


def _options() -> str:
    parts = ["# Options", "Every command and its options, as `minbert COMMAND --help` tells them."]
    described: dict[str, str] = {}  # groups of options that several commands have
    for command, (_, purpose) in COMMANDS.items():
        for words in [(command, action) for action in ACTIONS.get(command, ())] or [(command,)]:
            parser = parser_of(*words)
            parts += [f"## minbert {' '.join(words)}", (parser.description or purpose).strip()]
            parts += _groups(parser, words, described)
    return "\n\n".join(parts) + "\n"


def _groups(parser: ArgumentParser, words: tuple[str, ...], described: dict[str, str]) -> Iterator[str]:
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        table = _table(actions)
        title = (group.title or "").removesuffix(" options")
        if described.get(table):
            place = described[table]
            yield f"{title.capitalize()}: as of [minbert {place}](#minbert-{place.replace(' ', '-')})."
            continue
        described[table] = " ".join(words)
        if title not in ("options", "positional arguments"):
            yield f"**{title.capitalize()}.** {' '.join((group.description or '').split())}"
        yield table


def _table(actions: list[Action]) -> str:
    rows = ["| option | value | |", "|---|---|---|"]
    for action in actions:
        name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
        value = f"`{action.metavar}`" if action.metavar and action.option_strings else ""
        about = " ".join((action.help or "").split())
        rows.append(f"| `{name}`{{.whole}} | {value} | {about.replace('|', '&#124;').replace('<', '&lt;')} |")
    return "\n".join(rows)


def _methods() -> str:
    rows = ["| `--aggregator` | weights from | options | source |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        options = ", ".join(f"{option}={value}" for option, value in method.options.items())
        rows.append(f"| `{name}` | {method.source} | {options} | {method.reference} |")
    text = "Written `--aggregator name` or `name:option=value`; [surgery.md](../surgery.md) tells more."
    return f"# Surgery methods\n\n{text}\n\n" + "\n".join(rows) + "\n"


def _recipes() -> str:
    parts = [
        "# Recipes",
        "`minbert train --recipe NAME ...`, the later laid over the earlier ([recipes.md](../recipes.md)).",
    ]
    for name, what in recipes().items():
        options = "\n".join(f"{option}: {value}" for option, value in read_recipe(name).items())
        parts += [f"## {name}", what, f"```yaml\n{options}\n```"]
    return "\n\n".join(parts) + "\n"


def _files() -> str:
    parts = ["# Files"]
    for title, module in (("A run's folder", run_folder), ("An exported model", exported)):
        sentence, _, listed = (module.__doc__ or "").partition("\n\n")
        parts += [f"## {title}", sentence, f"```text\n{listed.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"
