"""Marian models with random weights and a real SentencePiece vocabulary, as small as they can be."""

import json
from pathlib import Path

SENTENCES = [
    "a man is playing a large flute .",
    "the woman is putting on lipstick .",
    "two dogs run through the grass and play with a ball",
    "police said three people were killed in the attack",
    "the film is a funny , gripping and warm story",
    "stocks fell as investors worried about growth",
    "a girl is riding a brown horse along the beach",
    "how do i learn to cook rice without a pot ?",
]


def write_models(folder: Path, directions: tuple[str, ...] = ("en-xx", "xx-en")) -> Path:
    """A model in `folder`/DIRECTION for each; their translations are nonsense of the vocabulary's words."""
    import sentencepiece
    import torch
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "sentences.txt"
    text.write_text("\n".join(SENTENCES * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "pieces"),
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces.model"))
    words = ["</s>", "<unk>", *(pieces.id_to_piece(number) for number in range(3, pieces.vocab_size())), "<pad>"]
    for index, direction in enumerate(directions):
        place = folder / direction
        place.mkdir()
        for name in ("source.spm", "target.spm"):
            (place / name).write_bytes((folder / "pieces.model").read_bytes())
        (place / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        source, target = direction.split("-")
        MarianTokenizer(
            *(str(place / name) for name in ("source.spm", "target.spm", "vocab.json")),
            source_lang=source,
            target_lang=target,
            model_max_length=300,
        ).save_pretrained(place)
        torch.manual_seed(index)
        shape = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
        shape |= dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=320)
        pad = len(words) - 1
        special = dict(pad_token_id=pad, eos_token_id=0, decoder_start_token_id=pad, forced_eos_token_id=0)
        model = MarianMTModel(MarianConfig(vocab_size=len(words), init_std=1.0, **shape, **special)).eval()
        model.generation_config.max_length = 16
        model.generation_config.bad_words_ids = [[pad]]
        model.save_pretrained(place)
    return folder
