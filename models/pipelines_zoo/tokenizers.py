"""Tokenizers of single characters, made on the spot for the class that a pipeline expects."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from tokenizers.pre_tokenizers import ByteLevel

VOCABULARY = 640  #: entries of every text model's embedding, more than any of these tokenizers has
LENGTH = 32  #: tokens that prompts are padded or cut to where the pipeline does not say how many
LETTERS = tuple(map(chr, range(32, 127)))
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if 'text' in part else '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% endfor %}{% endif %}\n{% endfor %}"
)
#: what prompt templates put around pictures and turns
MARKS = (
    "<image>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<|mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>", "<|begin_of_text|>",
)  # fmt: skip


def tokenizer(kind: str) -> Any:
    """A tokenizer of the class of this name, or of a fitting one where a pipeline takes any.

    It pads to `LENGTH` tokens where it is asked for its longest input.

    Raises:
        KeyError: no way to make one is known.
    """
    found = _MAKERS[kind]()
    found.model_max_length = LENGTH
    if found.pad_token is None:
        found.pad_token = found.eos_token
    if not found.chat_template:
        found.chat_template = CHAT
    return found


def _numbered(units: Any) -> dict[str, int]:
    return {unit: i for i, unit in enumerate(dict.fromkeys(units))}


def _clip() -> Any:
    letters = [letter for letter in LETTERS if letter != " "]
    ends = ("<|startoftext|>", "<|endoftext|>")
    units = _numbered([*letters, *(f"{letter}</w>" for letter in letters), *ends])
    return transformers.CLIPTokenizer(vocab=units, merges=[])


def _of_bytes(kind: str, *special: str, marks: tuple[str, ...] = MARKS) -> Callable[[], Any]:
    def make() -> Any:
        return _marked(kind, [*special, *sorted(ByteLevel.alphabet())], marks)

    return make


def _of_pieces(kind: str, *special: str) -> Callable[[], Any]:
    def make() -> Any:
        return _marked(kind, [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS], MARKS)

    return make


def _marked(kind: str, units: list[str], marks: tuple[str, ...]) -> Any:
    """A tokenizer that merges nothing."""
    found = getattr(transformers, kind)(vocab=_numbered(units), merges=[])
    found.add_special_tokens({"additional_special_tokens": list(marks)})
    return found


def _of_scores(kind: str, *special: str) -> Callable[[], Any]:
    def make() -> Any:
        pieces = [*special, "▁", *LETTERS]
        return getattr(transformers, kind)(vocab=[(piece, -1.0) for piece in pieces])

    return make


def _bert() -> Any:
    letters = [letter for letter in LETTERS if letter != " "]
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    return transformers.BertTokenizer(vocab=_numbered([*special, *letters, *(f"##{letter}" for letter in letters)]))


@cache
def _vits_vocabulary() -> str:
    path = Path(tempfile.mkdtemp()) / "vocab.json"
    path.write_text(json.dumps(_numbered(["<pad>", "<unk>", *LETTERS])))
    return str(path)


def _vits() -> Any:
    return transformers.VitsTokenizer(_vits_vocabulary(), phonemize=False)


_t5 = _of_scores("T5Tokenizer", "<pad>", "</s>", "<unk>")
_qwen = _of_bytes("Qwen2Tokenizer", "<|endoftext|>")
_gemma = _of_pieces("GemmaTokenizer", "<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_MAKERS: dict[str, Callable[[], Any]] = {
    "CLIPTokenizer": _clip,
    "T5Tokenizer": _t5,
    "Qwen2Tokenizer": _qwen,
    "GemmaTokenizer": _gemma,
    "LlamaTokenizer": _of_pieces("LlamaTokenizer", "<unk>", "<s>", "</s>"),
    "BertTokenizer": _bert,
    "RobertaTokenizer": _of_bytes("RobertaTokenizer", "<s>", "<pad>", "</s>", "<unk>", "<mask>", marks=()),
    "GPT2Tokenizer": _of_bytes("GPT2Tokenizer", "<|endoftext|>", marks=()),
    "XLMRobertaTokenizer": _of_scores("XLMRobertaTokenizer", "<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "ByT5Tokenizer": transformers.ByT5Tokenizer,
    "VitsTokenizer": _vits,
    "AutoTokenizer": _qwen,
    "AutoProcessor": _qwen,
    "TokenizersBackend": _qwen,
    "PreTrainedTokenizerBase": _qwen,
    "PythonBackend": _bert,
}
