"""Turn prompts into tokens with an export's tokenizer, without running code from its directory."""

from __future__ import annotations

from pathlib import Path

from loopexport.base import tokenizer as tokenizer_files
from loopexport.base.checkpoint import CONFIG
from loopexport.errors import OnnxError, OnnxInputError, one_line
from loopexport.export.directory import BASE_FOLDER

MAX_REASON_CHARS = 200


def load_tokenizer(root: Path):
    """Load the tokenizer in a directory with the code of transformers alone.

    Raises:
        OnnxError: there is no tokenizer, it needs its own code, or it is broken.
    """
    from transformers import AutoConfig, AutoTokenizer

    content = {"vocab.json", "tekken.json", tokenizer_files.SERIALISED}
    names = [path.name for path in root.iterdir() if tokenizer_files.FILES.fullmatch(path.name)]
    if not any(name in content or not name.endswith(".json") for name in names):
        raise OnnxError(f"no tokenizer in {root}; in Python, OnnxModel.generate takes token ids")
    native = root / BASE_FOLDER / CONFIG
    try:  # the looped config would run code from the directory
        known = {"config": AutoConfig.from_pretrained(native, trust_remote_code=False)} if native.is_file() else {}
        return AutoTokenizer.from_pretrained(root, trust_remote_code=False, **known)
    except Exception as error:  # tokenizers raises bare exceptions
        raise OnnxError(f"cannot load the tokenizer in {root}: {one_line(error, MAX_REASON_CHARS)}") from None


def encode(tokenizer, prompt: str, chat: bool | None, root: Path) -> list[int]:
    """The token ids of a prompt.

    Args:
        tokenizer: from `load_tokenizer`.
        prompt: a question, or text to continue.
        chat: use the chat template; None uses it if there is one.
        root: the directory, for messages.

    Raises:
        OnnxError: there is no chat template, or it fails.
        OnnxInputError: the prompt is empty.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise OnnxError(f"the tokenizer in {root} has no chat template; use --no-chat")
    if has_template and chat is not False:
        ids = tokenizer(_in_template(tokenizer, prompt, root), add_special_tokens=False).input_ids
    else:
        ids = tokenizer(prompt).input_ids
    if not ids:
        raise OnnxInputError("the prompt is empty; give at least one token")
    return ids


def _in_template(tokenizer, prompt: str, root: Path) -> str:
    message = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template may raise anything
        raise OnnxError(
            f"the chat template in {root} fails: {one_line(error, MAX_REASON_CHARS)}; use --no-chat"
        ) from None
