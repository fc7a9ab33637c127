"""Streamed pieces, joined, are the text of all tokens."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loopexport.onnx.runtime.streamed_text import StreamedText

CHARACTERS = [*"abenrstvm.,'!? ", "\n", "n't", "'s", "x"]


def byte_level(**options):
    tokenizer = Tokenizer(
        models.BPE({each: index for index, each in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def byte_fallback():
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abc."]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece():
    names = ["[UNK]", "##s", "##n", "##'", *"abenrstvm.,'!?", "n't", "do", "not"]
    tokenizer = Tokenizer(models.WordPiece({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=True)


def unigram():
    names = [("<unk>", 0.0), *((each.replace(" ", "\u2581"), -1.0) for each in CHARACTERS), ("\u2581n", -1.0)]
    tokenizer = Tokenizer(models.Unigram(names, 0, False))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=True)


KINDS = (byte_level, byte_fallback, word_piece, unigram)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_pieces_of_any_tokens_joined_are_their_text(make):
    tokenizer, chance = make(), random.Random(0)
    for _ in range(600):
        tokens = [chance.randrange(len(tokenizer)) for _ in range(chance.randint(1, 14))]
        text = StreamedText(tokenizer)
        joined = "".join([*map(text.add, tokens), text.end()])
        assert joined == tokenizer.decode(tokens, skip_special_tokens=True), tokenizer.convert_ids_to_tokens(tokens)


def test_complete_text_is_not_held_back():
    tokenizer = byte_level()
    text, word = StreamedText(tokenizer), "naïve 日本"
    pieces = [text.add(token) for token in tokenizer(word).input_ids]
    assert "".join(pieces) == word
    assert all(len(piece) <= 1 for piece in pieces)
