"""Mistakes that people make, and what they are told: what happened, where, and what to do about it.

None gets a traceback, each ends with exit code 2, prints nothing on standard output, and leaves every file as it was.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from minbert.launch.main import main

# In the folder {tmp}, from which the commands are given.
FILES: dict[str, str | bytes] = {
    "list.yaml": "- lr\n",
    "number.yaml": "1: 2\n",
    "value.yaml": "optimizer: {lr: fast}\nprocesses: 0\n",
    "twice.yaml": "lr: 1\nseed: 2\nlr: 3\n",
    "nested.yaml": "optimizer: {batch_size: 3}\n",
    "both.yaml": "lr: 1\noptimizer: {lr: 2}\n",
    "kind.yaml": "name: mine\nkind: clasification\n",
    "fine.csv": "sentence\nfine\n",
    "unquoted.csv": "sentence\nfine\ngood, but long\n",
    "latin.csv": b"sentence\ncaf\xe9\n",
    "marked.csv": b"\xef\xbb\xbfsentence\ncaf\xe9\n",
    "empty.csv": "",
    "header.csv": "sentence\n",
    "done.csv": "sentence,prediction\nfine,3\n",
    "open.csv": 'sentence\n"fine\nbad\n',
    "quote.csv": 'sentence\n"fi"ne\n',
    "twice.csv": "sentence,sentence\nfine,bad\n",
    "mine/thesis.tex": "",
    "i18n/translations/es.json": "{}",
    "told/report.json": "{}",
    "course/ids-sst-train.csv": "\tid\tsentence\tsentiment\n0\ta\tgreat\t7\n",
    "search/search.yaml": "samples: 2\nspace: {lr: {kind: loguniform, low: 1.0e-4, high: 1.0e-3}}\n"
    "base: {batch_size: 8, evaluations: 10}\n",
    "population/search.yaml": "samples: 2\nscheduler: pbt\nspace: {lr: {kind: choice, values: [1.0e-4, 1.0e-3]}}\n"
    "base: {evaluations: 10}\n",
    "ablation/ablation.yaml": "baseline: {}\nextensions: {}\nvariants: {baseline: {}}\ngroups: {}\nseeds: [0]\n",
}


class Mistake(NamedTuple):
    """A command line, with {tmp} for the folder above, {run} for a trained run and {untrained} for one that is not, and
    three parts of its message."""

    command: str
    what: str
    where: str
    remedy: str


SST = "predict {run} --task sst"
MISTAKES = [
    # Commands and options
    Mistake("trainn", "no command", "'trainn'", "did you mean 'train'?"),
    Mistake("fly", "no command", "'fly'", "there are train, pretrain, resume"),
    Mistake("train --batchsize 3", "no option", "--batchsize", "did you mean --batch-size?"),
    Mistake("train --optimizer.lr 3", "no option", "--optimizer.lr", "did you mean --lr?"),
    Mistake("train --optimizer adamw", "no option", "--optimizer", "`minbert train --help` lists all"),
    Mistake("train --xylophone 3", "no option", "--xylophone", "`minbert train --help` lists all"),
    Mistake("evaluate {run} --jsn", "no option", "--jsn", "did you mean --json?"),
    Mistake("resume {run} --forse", "no option", "--forse", "did you mean --force?"),
    Mistake("train --steps", "needs a value", "--steps", "needs a value"),
    Mistake("train --tasks", "needs a value", "--tasks", "needs a value"),
    Mistake("tune --space", "needs a value", "--space", "needs a value"),
    Mistake("ablate --seeds", "needs a value", "--seeds", "needs a value"),
    Mistake("ablate --extensions", "needs a value", "--extensions", "needs a value"),
    Mistake("ablate --groups", "needs a value", "--groups", "needs a value"),
    Mistake("train --steps 2.5", "not '2.5'", "--steps", "must be a valid integer"),
    Mistake("train --steps 0", "not '0'", "--steps", "must be greater than or equal to 1"),
    Mistake("train --lr fast", "not 'fast'", "--lr", "must be a valid number"),
    Mistake("train --lr -1", "not '-1'", "--lr", "must be greater than 0"),
    Mistake("train --zero-stage 4", "not '4'", "--zero-stage", "must be 0, 1, 2 or 3"),
    Mistake("train --precision fp16", "not 'fp16'", "--precision", "must be 'fp32', 'tf32' or 'bf16'"),
    Mistake("train --freeze all", "not 'all'", "--freeze", "'none', 'embeddings' or 'encoder', or a valid integer"),
    Mistake("train --task-weights 1 -2 1", "not '-2'", "--task-weights", "must be greater than 0"),
    Mistake("evaluate {run} --split all", "not 'all'", "--split", "must be 'train', 'dev' or 'test'"),
    Mistake("report {run} --mistakes 1e30", "not '1e30'", "--mistakes", "must be a valid integer"),
    Mistake("train --lr 1 2", "what is", "'2'", "Options start with --"),
    Mistake("train somewhere", "what is", "'somewhere'", "the run folder is given by --run"),
    Mistake("evaluate", "usage", "minbert evaluate RUN", "`minbert evaluate --help` tells more"),
    Mistake("resume --steps 3", "usage", "minbert resume RUN", "RUN is the folder of the run to go on with"),
    Mistake("export {run}", "usage", "minbert export RUN FOLDER", "`minbert export --help` tells more"),
    # Options that do not go together, or with the model
    Mistake("train --accumulation 33", "would be empty", "batch_size=32", "at most 32"),
    Mistake("train --extend-to 20", "not linear", "extend_to", "needs lr_schedule=constant"),
    Mistake("train --eval-every 5 --evaluations 3", "both say when", "eval_every", "give one of them"),
    Mistake("train --freeze encoder --unfreeze gradual", "heads alone", "freeze=encoder", "leave out head_warmup"),
    Mistake("train --freeze 3", "the encoder has 2 layers", "freeze=3", "at most that"),
    Mistake("train --max-length 513", "the encoder has 512", "max_length=513", "at most that"),
    Mistake("train --surgery-scope layer", "which sum is not", "surgery_scope=layer", "add aggregator=pcgrad"),
    Mistake("train --revision main", "tiny is here", "revision=main", "leave one out"),
    Mistake("train --task-weights 1 2", "needs one number", "task_weights", "for each of sst, quora, sts"),
    Mistake("train --device cuda", "PyTorch sees no CUDA device", "device=cuda", "`minbert doctor` tells more"),
    Mistake("train --processes 100000", "needs at least", "this machine has", "Ask for fewer processes"),
    Mistake(
        "train --aggregator pcgrad --task-schedule round_robin",
        "weighs the tasks of a step against each other",
        "aggregator=pcgrad",
        "needs task_schedule=all",
    ),
    # Names
    Mistake("train --tasks sst quoraa", "no task", "'quoraa'", "did you mean 'quora'? There are cfimdb"),
    Mistake("train --tasks sst foo", "no task", "'foo'", "There are cfimdb, quora, sst, sts"),
    Mistake("train --tasks sst sst", "twice", "sst, sst", "name each once"),
    Mistake("train --tasks cfimdb", "has no task cfimdb", "built-in corpus", "use --data or other --tasks"),
    Mistake("train --tasks {tmp}/kind.yaml", "not 'clasification'", "kind.yaml: kind", "'classification', 'binary'"),
    Mistake("train --losses foo=pearson", "no task of the run", "losses names foo", "there are sst, quora, sts"),
    Mistake("train --losses sst=pearson", "not pearson", "task sst: loss", "takes cross_entropy or squared_emd"),
    Mistake("train --aggregator pcgrda", "unknown aggregator", "'pcgrda'", "did you mean 'pcgrad'?"),
    Mistake("train --aggregator cagrad:d=1", "no option 'd'", "aggregator cagrad", "its options: c"),
    Mistake("train --aggregator nowhere:function", "no module nowhere", "{tmp}", "or among what is installed"),
    Mistake("train --recipe paper-ful", "no recipe", "'paper-ful'", "did you mean 'paper-full'?"),
    Mistake("train --trackers tensorbord", "no tracker", "'tensorbord'", "did you mean 'tensorboard'? There are"),
    Mistake("train --trackers clearml", "needs its package", "the tracker clearml", "pip install clearml"),
    # Files and folders
    Mistake("train --config {tmp}/nowhere.yaml", "No such file", "{tmp}/nowhere.yaml", "cannot read configuration"),
    Mistake("train --config {tmp}/mine", "it is a folder", "{tmp}/mine", "name a file"),
    Mistake("train --config {tmp}/list.yaml", "must hold", "{tmp}/list.yaml", "`key: value` lines"),
    Mistake("train --config {tmp}/number.yaml", "must hold", "{tmp}/number.yaml", "`key: value` lines"),
    Mistake("train --config {tmp}/value.yaml", "not 'fast'", "value.yaml: lr", "should be a valid number"),
    Mistake("train --config {tmp}/value.yaml", "not 0", "value.yaml: processes", "greater than or equal to 1"),
    Mistake("train --config {tmp}/twice.yaml", "line 3", "twice.yaml", "'lr' was given before, in line 1"),
    Mistake("train --config {tmp}/both.yaml", "given twice", "both.yaml", "alone and under optimizer"),
    Mistake("train --config {tmp}/nested.yaml", "no option under optimizer", "nested.yaml", "or under batch"),
    Mistake("train --data {tmp}/nothing", "does not exist", "data folder {tmp}/nothing", "A source is 'builtin'"),
    Mistake("train --data builtinn", "does not exist", "data folder {tmp}/builtinn", "A source is 'builtin'"),
    Mistake("train --data {tmp}", "does not exist", "{tmp}/ids-sst-train.csv", "the files of sst are"),
    Mistake("train --data {tmp}/course --tasks sst", "outside 0..4", "ids-sst-train.csv:2: label 7", "--bad-rows skip"),
    Mistake("train --augmented {tmp}/no.csv", "does not exist", "{tmp}/no.csv", "`minbert augment` writes such files"),
    Mistake("train --model {tmp}/nothing", "does not exist", "model folder {tmp}/nothing", "give `tiny`, `minilm`"),
    Mistake("train --model {tmp}", "has no config.json", "{tmp}", "give `tiny`, `minilm`"),
    Mistake("train --run {tmp}", "is not empty and no run folder", "{tmp}", "Give a new folder by --run"),
    Mistake("train --run /proc/nothing", "cannot be used", "run folder /proc/nothing", "give another"),
    Mistake("train --run {tmp}/list.yaml", "cannot be used", "run folder {tmp}/list.yaml", "give another"),
    Mistake("train --run {run} --batch-size 9 --seed 1", "8 in the folder", "batch_size", "by --force"),
    Mistake("resume {run} --lr 0.5", "other settings", "lr: 0.001 in the folder", "Leave these options out"),
    Mistake("resume {tmp}/nothing", "is not a run folder", "{tmp}/nothing", "name one that minbert train has made"),
    Mistake("evaluate {tmp}/nothing", "is not a run folder", "{tmp}/nothing", "name one that minbert train has made"),
    Mistake("rerun {tmp}/nothing", "is not a run folder", "{tmp}/nothing", "name one that minbert train has made"),
    Mistake("rerun {run} --run {run}", "holds a run already", "{run}", "give a new folder by --run"),
    Mistake("rerun {run} --nodes 2", "is about a job", "--nodes", "add --submit"),
    Mistake("rerun {run} --config {tmp}/value.yaml", "would replace", "--config", "give single options"),
    # What a model says
    Mistake("evaluate {run} --data {tmp}/nothing", "does not exist", "{tmp}/nothing", "A source is 'builtin'"),
    Mistake("evaluate {run} --split test", "has no labels", "test split of builtin", "`minbert predict`"),
    Mistake("predict {run} --text words", "say which task", "--task", "sst | quora | sts"),
    Mistake("predict {run} --task sst", "goes with --text or --csv", "--task", "written for every task"),
    Mistake("predict {run} --task cfimdb --text hello", "not trained on", "cfimdb", "only on sst, quora, sts"),
    Mistake("predict {run} --task sts --text hello", "--text has 1", "task sts takes 2 sentences", "quote each"),
    Mistake(f"{SST} --text one two", "--text has 2", "task sst takes 1 sentence", "quote each"),
    Mistake(f"{SST} --text words --csv {{tmp}}/header.csv", "not both", "--text or --csv", "give --text or --csv"),
    Mistake(f"{SST} --text words --out {{tmp}}/x.csv", "--text prints", "--out", "goes with --csv"),
    Mistake(f"{SST} --text \udcff", "half of a character", "text 1", "write it in UTF-8"),
    Mistake(f"{SST} --text words --data {{tmp}}", "not with --text", "--data", "goes with the course's files"),
    Mistake("predict {run} --out {tmp}/x.csv", "need a folder", "--out {tmp}/x.csv", "a file goes with --csv"),
    Mistake("predict {run} --out -", "need a folder", "--out -", "a file goes with --csv"),
    Mistake("predict {run} --data {tmp}", "the run's own data, builtin", "{run}/predictions", "say with --out FOLDER"),
    Mistake("predict {run} --data {tmp} --out {tmp}/list.yaml/x", "Not a directory", "list.yaml/x", "name another"),
    Mistake("predict {run} --data {tmp} --out {tmp}/new/er", "does not exist", "ids-sst-dev.csv", "the files of"),
    Mistake(f"{SST} --csv {{tmp}}/nothing.csv", "No such file", "{tmp}/nothing.csv", "cannot read"),
    Mistake(f"{SST} --csv {{tmp}}/unquoted.csv", "2 fields where", "unquoted.csv:3", 'is written as "..."'),
    Mistake(f"{SST} --csv {{tmp}}/open.csv", "unexpected end of data", "open.csv:2", 'is written as "..."'),
    Mistake(f"{SST} --csv {{tmp}}/quote.csv", "expected after", "quote.csv:2", 'is written as "..."'),
    Mistake(f"{SST} --csv {{tmp}}/latin.csv", "not UTF-8 (byte 12)", "latin.csv", "convert it first"),
    Mistake(f"{SST} --csv {{tmp}}/marked.csv", "not UTF-8 (byte 15)", "marked.csv", "convert it first"),
    Mistake(f"{SST} --csv {{tmp}}/empty.csv", "has no column sentence", "empty.csv", "rename the columns"),
    Mistake(f"{SST} --csv {{tmp}}/header.csv", "has no rows", "header.csv", "add some"),
    Mistake(f"{SST} --csv {{tmp}}/done.csv", "has a column 'prediction' already", "done.csv", "rename it"),
    Mistake(f"{SST} --csv {{tmp}}/twice.csv", "two columns are called sentence", "twice.csv:1", "Rename the other"),
    Mistake("predict {run} --task sts --csv {tmp}/header.csv", "no column sentence1", "header.csv", "rename"),
    Mistake(f"{SST} --csv {{tmp}}/fine.csv --out {{tmp}}/no/x.csv", "there is no folder", "{tmp}/no", "make it first"),
    Mistake(f"{SST} --csv {{tmp}}/fine.csv --out {{tmp}}", "it is a folder", "cannot write {tmp}", "name a file"),
    Mistake(f"{SST} --csv fine.csv --out {{untrained}}/config.yaml", "to a run", "config.yaml", "choose another"),
    Mistake("predict {run} --out {untrained}/predictions", "another run", "{untrained}/predictions", "name another"),
    # What comes out
    Mistake("export {untrained} {tmp}/new/er", "no trained model yet", "{untrained}", "the first evaluation writes"),
    Mistake("export {run} {tmp}", "not an empty folder", "{tmp}", "name a new one"),
    Mistake("export {run} {tmp}/list.yaml", "File exists", "{tmp}/list.yaml", "name another folder"),
    Mistake("export {run} {tmp}/list.yaml/x", "Not a directory", "{tmp}/list.yaml/x", "name another folder"),
    Mistake("export {tmp} {tmp}/new", "is not a run folder", "{tmp}", "name one that minbert train has made"),
    Mistake("report {run} --out {tmp}/no/x.html", "there is no folder", "{tmp}/no", "make it first"),
    Mistake("report {run} --out page.pdf", "is a .html file", "page.pdf", ".html"),
    Mistake("report {tmp}/mine", "is no run, search or ablation", "{tmp}/mine", "it has no config.yaml, search.yaml"),
    Mistake("report {tmp}/search", "no trial of", "{tmp}/search", "minbert tune --search"),
    Mistake("report {tmp}/ablation", "is finished yet", "{tmp}/ablation", "minbert ablate --ablation"),
    Mistake("compare {run}", "nothing to compare", "1 run in {run}", "two"),
    Mistake("watch {tmp}/mine", "there are no runs", "{tmp}/mine", "name the folder"),
    Mistake("watch {tmp}/nothing", "is no folder", "{tmp}/nothing", "name the folder"),
    Mistake("checkpoint convert {run} {run}/best.safetensors", "belongs to a run", "{run}/best", "choose another name"),
    Mistake("checkpoint convert {run} {tmp}/no/x.safetensors", "there is no folder", "{tmp}/no", "make it first"),
    Mistake("checkpoint convert {tmp} {tmp}/list.yaml/x --steps 3", "Not a directory", "list.yaml/x", "give another"),
    # Searches and ablations
    Mistake("tune --samples 0", "not '0'", "--samples", "greater than or equal to 1"),
    Mistake("tune --sampels 3", "no option", "--sampels", "did you mean --samples?"),
    Mistake("tune --run x", "a run folder of its own", "each trial", "--search names the folder"),
    Mistake("tune --nodes 2", "is about a job", "--nodes", "add --slurm"),
    Mistake("tune --slurm --address auto", "two places", "--address and --slurm", "choose one"),
    Mistake("tune --algorithm pbt", "not 'pbt'", "--algorithm", "must be 'random', 'grid' or 'tpe'"),
    Mistake("tune --algorithm grid", "has a range", "lr", "a grid needs lists of values"),
    Mistake("tune --cpus inf", "not 'inf'", "--cpus", "must be"),
    Mistake("tune --seed 1180591620717411303424", "not '11", "--seed", "must be less than"),
    Mistake("tune --space nowhere.yaml", "No such file", "nowhere.yaml", "cannot read"),
    Mistake("tune --space lr", "not 'lr'", "--space", "takes a YAML file, or OPTION=VALUES"),
    Mistake("tune --space dropot=uniform(0,0.3)", "no option dropot", "--space", "did you mean head_dropout?"),
    Mistake("tune --space lr=uniform(1e-4,1e-5)", "is not below", "--space: lr", "0.0001 is not below 1e-05"),
    Mistake("tune --space lr=loguniform(0,1)", "not at 0", "--space: lr", "starts above zero"),
    Mistake("tune --space lr=normal(0,1)", "is none of", "--space: lr", "uniform(low,high), loguniform(low,high)"),
    Mistake("tune --space lr=1e-3 lr=1e-4", "twice", "--space", "names lr twice"),
    Mistake("tune --space lr=1e-3,inf", "not inf", "--space: lr", "must be finite"),
    Mistake("tune --space batch_size=uniform(8,32)", "is a whole number", "batch_size", "int(8,32)"),
    Mistake("tune --space batch_size=8,8", "twice", "--space: batch_size", "names a value twice"),
    Mistake("tune --space aggregator=sum,pcgard", "pcgard", "--space", "did you mean 'pcgrad'"),
    Mistake("tune --space run=a,b", "cannot be searched", "--space: run", "every trial has it from the search"),
    Mistake("tune --space lr=1e-3,1e-4 --lr 1e-3", "given as an option", "--space: lr", "leave one of them out"),
    Mistake("tune --scheduler pbt --space hidden_layers=1,2", "has none of them", "scheduler=pbt", "changes clip"),
    Mistake("tune --scheduler pbt --algorithm tpe", "does not go with it", "algorithm=tpe", "makes its own proposals"),
    Mistake("tune --scheduler pbt --concurrent 2", "all trials take turns", "scheduler=pbt", "--cpus or --gpus"),
    Mistake("tune --seeds 1 2", "for the best trials once more", "--seeds", "--again 3 says how many"),
    Mistake("tune --again 2 --seeds 0 1", "the search's own seed", "--seeds: 0", "Give others"),
    Mistake("tune --data /nowhere", "does not exist", "/nowhere", "A source is 'builtin'"),
    Mistake("tune --search {tmp}/mine", "is not empty and no search", "{tmp}/mine", "Give another --search"),
    Mistake("tune --search {tmp}/list.yaml/below", "cannot be used", "list.yaml/below", "Not a directory"),
    Mistake("tune --model /nowhere", "does not exist", "model folder /nowhere", "give `tiny`, `minilm`"),
    Mistake("tune --trackers clearly_not", "no tracker", "'clearly_not'", "There are aim"),
    Mistake("tune --again 2 --scheduler pbt", "schedules of options", "--again", "minbert tune --best SEARCH"),
    Mistake("tune --search {tmp}/list.yaml", "is a file", "{tmp}/list.yaml", "name a folder"),
    Mistake("tune --search {tmp}/search --batch-size 16", "another search", "batch_size: 8", "another --search"),
    Mistake("tune --search {tmp}/population --space lr=1e-2,1e-3", "does not go on", "--space", "another --search"),
    Mistake("tune --best nowhere", "is not a search", "nowhere", "it has no search.yaml"),
    Mistake("tune --best {tmp}/search", "has a score yet", "{tmp}/search", "minbert tune --search {tmp}/search"),
    Mistake("ablate --extensions siamse", "siamse", "extension", "siamese"),
    Mistake("ablate --seed 3", "has its own seed", "each run of an ablation", "--seeds says which"),
    Mistake("ablate --ablation {tmp}/mine", "is not empty and no ablation", "{tmp}/mine", "Give another --ablation"),
    # Pretraining, augmentation, jobs
    Mistake("pretrain --text a.txt", "no option", "--text", "did you mean --texts?"),
    Mistake("pretrain --texts nowhere.txt", "is no file", "nowhere.txt", "which task mlm has its texts from"),
    Mistake("pretrain --partition gpu", "is for a job", "--partition", "add --submit"),
    Mistake("augment", "usage", "minbert augment TASK", "--help"),
    Mistake("augment sts --output {tmp}/out --pivot", "needs a value", "--pivot", "needs a value"),
    Mistake("augment sts --output {tmp}/out --elements 3", "is about a job", "--elements", "add --slurm"),
    Mistake("augment sts --output {tmp}/mine", "no earlier augmentation", "{tmp}/mine", "name another folder"),
    Mistake("augment sts --output {tmp}/i18n", "no earlier augmentation", "{tmp}/i18n", "name another folder"),
    Mistake("augment sts --output {tmp}/told", "no earlier augmentation", "{tmp}/told", "name another folder"),
    Mistake("augment sts --output out --task-folder {tmp}/no", "does not exist", "{tmp}/no", "NAME.yaml"),
    Mistake("augment sts --output out --min-similarity 0.8 --model tiny", "no pretrained weights", "tiny", "`minilm`"),
    Mistake("augment sts --output out --min-similarity 0.8 --model {tmp}/no", "not exist", "folder {tmp}/no", "give"),
    Mistake("train --task-folder {tmp}/list.yaml", "is a file", "task folder {tmp}/list.yaml", "name a folder"),
    Mistake("augment stss --output {tmp}/out", "no task", "'stss'", "did you mean 'sts'?"),
    Mistake("augment sts sts --output {tmp}/out", "named twice", "a task", "twice"),
    Mistake("augment sts --max-copy 2 --output {tmp}/out", "not '2'", "--max-copy", "must be less than or equal to 1"),
    Mistake("augment sts --time 8h --output {tmp}/out", "is about a job", "--time", "add --slurm"),
    Mistake("submit somewhere", "what is", "'somewhere'", "Options start with --"),
    Mistake("submit --partion x", "no option", "--partion", "did you mean --partition?"),
    Mistake("submit --executor slrum", "not 'slrum'", "--executor", "must be 'slurm', 'local' or 'debug'"),
    Mistake("submit --sweep sed=1,2", "no option", "--sed", "did you mean --seed?"),
    Mistake("submit --sweep lr=1,x", "not 'x'", "--lr", "must be"),
    Mistake("submit --sweep seed", "takes", "--sweep", "OPTION=VALUE,VALUE"),
    Mistake("submit --executor local --nodes 2", "has this machine only", "nodes=2", "leave it out"),
]  # fmt: skip


def state(*folders: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, and of the folders their names."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.name == ".lock":  # which says nothing when nobody holds it
                continue
            status = path.lstat()
            found[str(path)] = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def places(request, tmp_path, monkeypatch) -> dict[str, Path]:
    """What stands for {tmp}, {run} and {untrained}; a run is trained only for commands that name one."""
    for name, content in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {"tmp": tmp_path}
    command = request.node.callspec.params["mistake"].command
    if "{run}" in command or "{untrained}" in command:
        trained = request.getfixturevalue("trained")
        found |= {"run": trained.path, "untrained": tmp_path / "untrained"}
        found["untrained"].mkdir()
        shutil.copyfile(trained.config_file, found["untrained"] / "config.yaml")
    return found


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.command for mistake in MISTAKES])
def test_a_mistake_is_told_with_what_where_and_what_to_do(mistake, places, capsys):
    before = state(*places.values())
    assert main([word.format(**places) for word in mistake.command.split()]) == 2
    said = capsys.readouterr()
    message = " ".join(said.err.split())
    for part in (mistake.what, mistake.where, mistake.remedy):
        assert part.format(**places) in message
    assert said.out == "" and "Traceback" not in message and len(message) < 3000
    assert state(*places.values()) == before
