"""A small real tokenizer."""

from __future__ import annotations

import json


def write_tokenizer(directory, tokenizer_class):
    """Save a small byte-level tokenizer; with `tokenizer_class` None, the files leave the class to the model type."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<pad>", "<s>", "</s>", "<unk>"]
    )
    tokenizer.train_from_iterator(["it is 12345 and it is 67890, isn't it"] * 9, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    (directory / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", **config}))
