"""The model card of an exported model: what it is, how it was trained, how well it does, and what to be careful of."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from minbert.data.task import Task
from minbert.trainer.config import RunConfig, flatten
from minbert.trainer.evaluation.prediction_files import predicted_tasks
from minbert.trainer.model.multitask import MultitaskModel
from minbert.trainer.model.weights import is_hub_name
from minbert.trainer.run.folder import RunFolder

# Not what makes the model, or paths of somebody's machine.
LEFT_OUT = {
    "run",
    "cache",
    "task_folder",
    "data",
    "model",
    "revision",
    "tasks",
    "augmented",
    "teachers",
    "recipe",
    "trackers",
}
METRICS = {"pearson": "pearsonr", "spearman": "spearmanr", "matthews": "matthews_correlation"}  # on the hub


def model_card(
    run: RunFolder,
    config: RunConfig,
    model: MultitaskModel,
    scores: Mapping[str, float],
    step: int,
    seeds: Mapping[int, Mapping[str, float]] = {},
) -> str:
    """README.md with the front matter that the hub reads; `scores` on dev at `step`, and those of other `seeds`."""
    tasks = predicted_tasks(config)
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(config, tasks, scores), sort_keys=False)}---",
        f"# {_title(config, tasks)}",
        _what_it_is(config, model),
        f"## Scores\n\n{_scores(config, scores, step, seeds)}",
        f"## How to load it\n\n{_loading(config, tasks)}",
        f"## How it was trained\n\n{_training(run, config)}",
        "## What to be careful of\n\n" + "\n".join(f"- {caveat}" for caveat in _caveats(config, tasks)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: RunConfig, tasks: Iterable[Task], scores: Mapping[str, float]) -> dict[str, Any]:
    base = config.encoder.model
    results = [
        {
            "task": {"type": "text-classification", "name": task.title},
            "dataset": {"name": f"{task.title}, dev, of {_data(config)}", "type": task.name},
            "metrics": [{"type": METRICS.get(str(task.metric), task.metric), "value": round(scores[task.name], 4)}],
        }
        for task in tasks
        if task.name in scores
    ]
    return {
        "library_name": "transformers",
        "tags": ["minbert", "multitask", "bert"],
        **({"base_model": base} if is_hub_name(base) else {}),
        "model-index": [{"name": _title(config, tasks), "results": results}],
    }


def _title(config: RunConfig, tasks: Iterable[Task]) -> str:
    name = Path(config.encoder.model).name
    return f"{name}: {', '.join(task.title for task in tasks) or 'masked language model'}"


def _data(config: RunConfig) -> str:
    """The source without the folder of somebody's machine."""
    known = {"builtin": "the built-in corpus of minbert", "hub": "the Hugging Face hub"}
    return known.get(config.corpus.data, Path(config.corpus.data.removeprefix("hub:")).name)


def _what_it_is(config: RunConfig, model: MultitaskModel) -> str:
    shape, encoder = model.bert.config, config.encoder
    start = "random weights" if encoder.model == "tiny" else f"`{Path(encoder.model).name}`"
    if is_hub_name(encoder.model):
        start = f"`{encoder.model}` at revision `{encoder.revision}`"
    pooled = "the mean of the last hidden states" if encoder.pooling == "mean" else "the pooler's output for [CLS]"
    parameters = sum(parameter.numel() for parameter in model.bert.parameters())
    return (
        f"A BERT encoder of {shape.num_hidden_layers} layers of {shape.hidden_size} ({parameters:,} parameters), "
        f"trained from {start} by minbert {version('minbert')}. A sentence's embedding is {pooled}."
    )


def _scores(config: RunConfig, scores: Mapping[str, float], step: int, seeds: Mapping[int, Mapping[str, float]]) -> str:
    if not scores:
        return "It is the mean of several models' weights, and was not scored when it was made."
    limit = config.corpus.eval_limit
    examples = f"{limit:,} examples per task of the dev split" if limit else "the whole dev split"
    about = f"On {examples}, of the run with seed {config.seed} at step {step:,}, the best by this very score."
    columns = ["task", "metric", "dev"]
    everyone = {**seeds, config.seed: scores}
    if len(everyone) > 1:
        columns.append(f"mean ± standard deviation of {len(everyone)} seeds")
        about += f" Beside it the runs with seeds {', '.join(map(str, sorted(everyone)))}, alike in all else."
    else:
        about += " How it varies with the seed was not measured."
    rows = []
    for task in config.corpus.tasks:
        if task.name not in scores:
            continue
        values = [each[task.name] for each in everyone.values()]
        spread = [f"{mean(values):.4f} ± {stdev(values):.4f}"] if len(values) > 1 else []
        rows.append([task.title, str(task.metric), f"{scores[task.name]:.4f}", *spread])
    table = [columns, ["---"] * len(columns), *rows]
    return "\n".join([about, "", *(f"| {' | '.join(row)} |" for row in table)])


def _loading(config: RunConfig, tasks: list[Task]) -> str:
    text = """The encoder, with nothing but transformers:

```python
from transformers import AutoModel, AutoTokenizer

tokenizer, encoder = AutoTokenizer.from_pretrained(FOLDER), AutoModel.from_pretrained(FOLDER)
```"""
    if any(not config.heads.joins(task) for task in tasks):
        text += """

Embeddings of sentences, pooled as in training:

```python
from sentence_transformers import SentenceTransformer

embeddings = SentenceTransformer(FOLDER).encode(["a first sentence", "a second one"])
```"""
    if tasks:
        task = tasks[0]
        example = '[("a first sentence", "a second one")]' if task.is_pair else '["a sentence"]'
        text += f"""

The tasks' heads, with `multitask_encoder.py`, which lies here and needs torch, transformers and safetensors:

```python
from multitask_encoder import MultitaskEncoder

MultitaskEncoder.from_pretrained(FOLDER).predict("{task.name}", {example})
```

Tasks: {"; ".join(_described(task) for task in tasks)}."""
    return text + "\n\nAnd as the start of another training: `minbert train --model FOLDER`."


def _described(task: Task) -> str:
    given = "two sentences" if task.is_pair else "a sentence"
    answer = f"{task.range[0]:g} to {task.range[1]:g}" if task.range else ", ".join(task.classes)
    return f"`{task.name}` ({given}: {answer})"


def _training(run: RunFolder, config: RunConfig) -> str:
    default, own = flatten(RunConfig()), config.model_dump(mode="json")
    flat = {name: value for section in own.values() if isinstance(section, dict) for name, value in section.items()}
    flat |= {name: value for name, value in own.items() if not isinstance(value, dict)}
    changed = {name: flat[name] for name, value in flatten(config).items() if value != default[name]}
    changed = {name: value for name, value in changed.items() if name not in LEFT_OUT}
    commit = run.code_state()["commit"]
    text = f"On {_data(config)}, tasks {', '.join(config.corpus.names)}"
    text += f", with the code of commit `{commit}`." if commit else "."
    if config.corpus.augmented:
        text += " New rows made by back translation were trained on, too."
    if config.corpus.train_limit:
        text += f" At most {config.corpus.train_limit:,} examples per task were trained on."
    return text + f" What was not as by default:\n\n```yaml\n{yaml.safe_dump(changed, sort_keys=False)}```"


def _caveats(config: RunConfig, tasks: list[Task]) -> list[str]:
    found = [
        "The dev score is flattered: it chose which step of the run this is. Compare models on a test split, by which "
        "nothing was chosen.",
        f"Sentences beyond {config.corpus.max_length} tokens are cut off.",
    ]
    if config.corpus.data == "builtin":
        found.append("The built-in corpus is generated from a few patterns: nothing here says anything of real texts.")
    if any(task.kind == "regression" and task.is_pair and not task.is_cosine for task in tasks):
        found.append(
            "Similarity is what its head says of two embeddings. Their cosine may serve, but was neither trained nor "
            "measured."
        )
    if tasks and not any(not config.heads.joins(task) for task in tasks):
        found.append("Pairs were read as one sequence: a sentence alone has no embedding that was trained.")
    if config.encoder.model == "minilm":
        found.append("MiniLM's weights had seen Quora's question pairs before: scores on them are not of unseen data.")
    if {"sts"} & set(config.corpus.names) and config.corpus.data.startswith("hub"):
        found.append("GLUE's STS-B holds the pairs of the CS 224N course's test split.")
    if config.optimizer.average_decay:
        found.append("The weights are a moving average of those that were trained.")
    found.append("Nothing was tested for bias; the texts that a model was trained on have their own.")
    return found
