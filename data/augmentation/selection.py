"""Which back translations are kept: the filters over all texts and recipes, and what they dropped, counted."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from minbert.data.augmentation.filters import SIMILARITY, FilterOptions, first_objection, plain, unmark
from minbert.data.augmentation.recipe import Recipe
from minbert.data.augmentation.rows import Variant
from minbert.data.augmentation.store import Translation
from minbert.data.errors import DataError
from minbert.data.sources.examples import BadRows
from minbert.data.sources.loading import load_examples
from minbert.data.task import Split, Task

SHOWN = 10  # dropped texts of each reason in a report
REPEATED = "repeated"  # another pivot or variant gave the same

Cosines = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass
class Selection:
    """`variants`: kept ones by text. `counts`: per recipe, how many translations there were, were kept (`kept`), and
    were dropped for each reason. `examples`: some of the dropped, by reason."""

    variants: dict[str, list[Variant]] = field(default_factory=dict)
    counts: dict[Recipe, Counter[str]] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str | float]]] = field(default_factory=dict)

    def drop(self, recipe: Recipe, reason: str, text: str, found: Translation, **more: float) -> None:
        self.counts[recipe][reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < SHOWN:
            shown.append({"text": text, recipe.pivot: found.pivot, "back": found.back} | more)


def select(
    texts: Iterable[str],
    translations: Mapping[Recipe, Mapping[str, Translation]],
    options: FilterOptions,
    min_similarity: float | None = None,
    cosines: Cosines | None = None,
) -> Selection:
    """Filter every translation. With `min_similarity`, `cosines` tells how alike the text and what came back are."""
    selection, passed = Selection(counts={recipe: Counter() for recipe in translations}), []
    for text in texts:
        met: set[str] = set()
        for recipe, found in ((recipe, store[text]) for recipe, store in translations.items()):
            reason, back = first_objection(text, found.back, options), unmark(text, found.back)
            if reason is None and plain(back) in met:
                reason = REPEATED
            if reason is not None:
                selection.drop(recipe, reason, text, found)
                continue
            met.add(plain(back))
            passed.append((recipe, text, back, found))
    alike = [1.0] * len(passed)
    if min_similarity is not None:
        assert cosines is not None
        alike = cosines([text for _, text, _, _ in passed], [back for _, _, back, _ in passed])
    for (recipe, text, back, found), cosine in zip(passed, alike, strict=True):
        if min_similarity is not None and cosine < min_similarity:
            selection.drop(recipe, SIMILARITY, text, found, cosine=round(cosine, 4))
            continue
        selection.counts[recipe]["kept"] += 1
        selection.variants.setdefault(text, []).append(Variant(back, recipe.pivot, recipe.source, recipe.variant))
    return selection


@dataclass(frozen=True)
class HeldOut:
    """Plain forms of the sentences of dev and test splits; which splits they are of, and why others are not there."""

    sentences: frozenset[str]
    splits: tuple[str, ...]
    absent: Mapping[str, str]


def held_out(source: str, tasks: Sequence[Task], others: Iterable[Task], bad_rows: BadRows) -> HeldOut:
    """Of the dev and test splits of `tasks`, and of those of `others` that the source has. Raises DataError if a dev
    split of `tasks` cannot be read."""
    found: set[str] = set()
    read: list[str] = []
    absent: dict[str, str] = {}
    splits: tuple[Split, ...] = ("dev", "test")
    names = {task.name for task in tasks}
    for task in (*tasks, *(task for task in others if task.name not in names)):
        for split in splits:
            try:
                examples = load_examples(source, task, split, bad_rows if task.name in names else "skip")
            except DataError as error:
                if task.name in names and split == "dev":
                    raise
                absent[f"{task.name} {split}"] = str(error).splitlines()[0]
                continue
            read.append(f"{task.name} {split}")
            found.update(plain(text) for column in examples.sentences for text in column)
    return HeldOut(frozenset(found), tuple(read), absent)
