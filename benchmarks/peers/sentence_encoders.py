"""Scores of the pair tasks' dev splits by what others use to embed sentences: `encode` of sentence-transformers, and
the feature-extraction pipeline of transformers. From texts to the similarity of each pair; work is counted in
sentences."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from turns import Skipped, Step

BATCH = 32  # of both; the default of `encode`, and the pipeline's is 1

Embed = Callable[[Sequence[str]], Tensor]


def encode(run, config) -> Step:
    try:
        from sentence_transformers import SentenceTransformer, models
    except ImportError:
        raise Skipped("pip install sentence-transformers") from None
    transformer = models.Transformer(config.encoder.model, max_seq_length=config.corpus.max_length)
    model = SentenceTransformer(modules=[transformer, models.Pooling(transformer.get_word_embedding_dimension())])
    if config.parallel.precision == "bf16":
        model = model.bfloat16()
    return _scoring(
        config,
        lambda sentences: model.encode(
            list(sentences), batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False
        ),
    )


def pipeline(run, config) -> Step:
    from transformers import AutoTokenizer, BertModel
    from transformers import pipeline as build_pipeline

    from minbert.trainer.processes.world import pick_device

    dtype = torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32
    extract = build_pipeline(
        "feature-extraction",
        model=BertModel.from_pretrained(config.encoder.model, torch_dtype=dtype),
        tokenizer=AutoTokenizer.from_pretrained(config.encoder.model),
        device=pick_device(config.parallel),
        batch_size=BATCH,
    )
    cut = {"truncation": True, "max_length": config.corpus.max_length}

    def embed(sentences: Sequence[str]) -> Tensor:
        # It says not which states are padding: the first token's is the one to take.
        states = extract(list(sentences), tokenize_kwargs=cut, return_tensors=True)
        return torch.stack([each[0, 0] for each in states])

    return _scoring(config, embed)


def _scoring(config, embed: Embed) -> Step:
    from minbert.trainer.run.data import load_examples_of

    tasks = [task for task in config.corpus.tasks if task.is_pair]
    splits = [load_examples_of(config, task.name, "dev") for task in tasks]

    @torch.inference_mode()
    def step(_: int) -> int:
        for split in splits:
            u, v = (embed(column) for column in split.sentences)
            torch.corrcoef(torch.stack([torch.cosine_similarity(u, v).cpu(), torch.from_numpy(split.labels)]))
        return sum(2 * len(split) for split in splits)

    return step
