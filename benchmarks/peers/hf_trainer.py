"""An epoch of the three tasks with transformers' Trainer: a script as a user of that library writes it, which reads
CSV files, tokenises, trains, and scores the dev splits.

    python benchmarks/peers/hf_trainer.py SETTINGS.json

A step has a batch of every task, as ours: a loader for each, whose sampler is the Trainer's own choice, random or
grouped by length. Sentences are padded to the longest of their batch.
"""

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))
from peers.hf import Multitask


class Rows(Dataset):
    """A CSV file of a task: its columns of sentences, then its label."""

    def __init__(self, file: Path, columns: int, tokenizer, max_length: int):
        with file.open(newline="") as lines:
            rows = list(csv.reader(lines))
        self.labels = [float(row[-1]) for row in rows]
        self.columns = [
            tokenizer([row[side] for row in rows], truncation=True, max_length=max_length)["input_ids"]
            for side in range(columns)
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict:
        # `input_ids` is where the Trainer looks for lengths to group by.
        sides = [column[row] for column in self.columns]
        return {"input_ids": list(chain(*sides)), "sides": sides, "label": self.labels[row]}


def collate(name: str, tokenizer, rows: list[dict]) -> dict:
    sides = zip(*(row["sides"] for row in rows))
    columns = [dict(tokenizer.pad({"input_ids": list(side)}, return_tensors="pt")) for side in sides]
    return {"name": name, "columns": columns, "labels": torch.tensor([row["label"] for row in rows])}


class Together:
    """A batch of each task's loader at a time, until the first is at its end."""

    def __init__(self, loaders: list[DataLoader], steps: int):
        self.loaders, self.steps, self.dataset = loaders, steps, loaders[0].dataset
        self.batch_size = loaders[0].batch_size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict]:
        endless = [self._endless(loader) for loader in self.loaders]
        for _ in range(self.steps):
            yield {"tasks": [next(each) for each in endless]}

    @staticmethod
    def _endless(loader: DataLoader) -> Iterator[dict]:
        while True:
            yield from loader


class MultitaskTrainer(Trainer):
    def __init__(self, rows: Mapping[str, Rows], steps: int, tokenizer, **options):
        self.rows, self.steps = rows, steps
        super().__init__(processing_class=tokenizer, **options)

    def get_train_dataloader(self) -> Together:
        return Together([self._loader(name, rows) for name, rows in self.rows.items()], self.steps)

    def _loader(self, name: str, rows: Rows) -> DataLoader:
        return DataLoader(
            rows,
            self.args.train_batch_size,
            sampler=self._get_train_sampler(rows),
            collate_fn=partial(collate, name, self.processing_class),
            drop_last=True,
        )

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, **_) -> Tensor:
        return sum(
            model.loss(task["name"], model(task["name"], task["columns"]), task["labels"]) for task in inputs["tasks"]
        )

    def prediction_step(self, model, inputs: dict, *_, **__) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad(), self.autocast_smart_context_manager():
            outputs = model(inputs["name"], inputs["columns"])
        loss = model.loss(inputs["name"], outputs, inputs["labels"])
        return loss, model.predictions(inputs["name"], outputs).float(), inputs["labels"]


def score(kind: str, found) -> dict[str, float]:
    predicted, labels = found.predictions, found.label_ids
    if kind == "regression":
        return {"score": float(np.corrcoef(predicted, labels)[0, 1])}
    return {"score": float((predicted == labels).mean())}


def main(settings: dict) -> None:
    set_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    folder, out = Path(settings["data"]), Path(settings["out"])

    def read(split: str) -> dict[str, Rows]:
        return {
            task["name"]: Rows(folder / f"{task['name']}-{split}.csv", task["columns"], tokenizer, settings["length"])
            for task in settings["tasks"]
        }

    train, dev = read("train"), read("dev")
    model = Multitask(settings["model"], settings["tasks"], settings["dropout"])
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=64,
        learning_rate=settings["lr"],
        max_grad_norm=settings["clip"],
        group_by_length=settings["grouped"],
        bf16=settings["precision"] == "bf16",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="steps",
        save_steps=settings["steps"],
        logging_steps=10,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_num_workers=0,
        label_names=["labels"],
        seed=settings["seed"],
    )
    trainer = MultitaskTrainer(
        train, settings["steps"], tokenizer, model=model, args=arguments, train_dataset=next(iter(train.values()))
    )
    trainer.train()
    scores = {}
    for task in settings["tasks"]:
        trainer.data_collator = partial(collate, task["name"], tokenizer)
        trainer.compute_metrics = partial(score, task["kind"])
        scores[task["name"]] = trainer.evaluate(dev[task["name"]])["eval_score"]
    (out / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    torch.set_num_threads(json.loads(Path(sys.argv[1]).read_text())["threads"])
    main(json.loads(Path(sys.argv[1]).read_text()))
