"""Prompts as tokens, by the tokenizer of an export and by no code that lies beside it."""

from __future__ import annotations

from pathlib import Path

from loopexport.base import tokenizer as tokenizer_files
from loopexport.base.checkpoint import CONFIG
from loopexport.errors import OnnxError, OnnxInputError
from loopexport.export.directory import BASE_FOLDER


def load_tokenizer(root: Path):
    """The tokenizer in a directory, by the code of transformers alone.

    Raises:
        OnnxError: there is none, or it needs code of its own, or it is broken.
    """
    from transformers import AutoConfig, AutoTokenizer

    content = {"vocab.json", "tekken.json", tokenizer_files.SERIALISED}
    names = [path.name for path in root.iterdir() if tokenizer_files.FILES.fullmatch(path.name)]
    if not any(name in content or not name.endswith(".json") for name in names):
        raise OnnxError(f"no tokenizer in {root}; the class OnnxModel takes token ids")
    native = root / BASE_FOLDER / CONFIG
    try:  # the looped config would take the directory's code
        known = {"config": AutoConfig.from_pretrained(native, trust_remote_code=False)} if native.is_file() else {}
        return AutoTokenizer.from_pretrained(root, trust_remote_code=False, **known)
    except Exception as error:  # tokenizers raises bare ones
        raise OnnxError(f"cannot load the tokenizer in {root}: {one_line(error)}") from None


def encode(tokenizer, prompt: str, chat: bool | None, root: Path) -> list[int]:
    """A prompt as token ids.

    Args:
        tokenizer: from `load_tokenizer`.
        prompt: a question, or text to go on with.
        chat: whether to put it into the chat template; None does where there is one.
        root: the directory, for messages.

    Raises:
        OnnxError: there is no such template, or it fails.
        OnnxInputError: there is nothing to encode.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise OnnxError(f"the tokenizer in {root} has no chat template; use --no-chat")
    if has_template and chat is not False:
        ids = tokenizer(_in_template(tokenizer, prompt, root), add_special_tokens=False).input_ids
    else:
        ids = tokenizer(prompt).input_ids
    if not ids:
        raise OnnxInputError("the prompt is empty: there is no token to go on from")
    return ids


def _in_template(tokenizer, prompt: str, root: Path) -> str:
    message = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template does in Jinja
        raise OnnxError(f"the chat template in {root} fails: {one_line(error)}; use --no-chat") from None


def one_line(error: Exception) -> str:
    """What an error of other people's code says, in a line."""
    return " ".join(str(error).split())[:200]
