"""Text to token ids and back, and a model's chat template. Needs `tokenizers` and, for chat, `jinja2`; never transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .. import errors

# How llama.cpp names a pre-tokenizer, and what it means: (split digits one by one, regular expression; None is GPT-2's own).
_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[str, tuple[bool, str | None]] = {
    "default": (False, None),
    "gpt-2": (False, None),
    "smollm": (True, None),
    "llama-bpe": (False, _LLAMA3_SPLIT),
}
TOKEN_TYPE_CONTROL, TOKEN_TYPE_USER_DEFINED = 3, 4


def _missing(package: str, error: ImportError) -> errors.MissingDependencyError:
    return errors.MissingDependencyError(f"{package} is needed for text ({error}): pip install 'tvm_infer[llm]'")


def byte_level_bpe(tokens: Sequence[str], token_types: Sequence[int], merges: Sequence[str], pre: str) -> str:
    """The JSON of a `tokenizers.Tokenizer` for a byte-level BPE vocabulary as GGUF files carry it.

    tokens : id to token; token_types : GGUF's type of each (3 control, 4 user defined); merges : "left right" by rank;
    pre : llama.cpp's name of the pre-tokenizer. Raises ModelError for a name that is not in PRE_TOKENIZERS.
    """
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as e:
        raise _missing("tokenizers", e) from e
    if pre not in PRE_TOKENIZERS:
        raise errors.ModelError(
            f"tokenizer.ggml.pre is {pre!r}; known pre-tokenizers are {', '.join(sorted(PRE_TOKENIZERS))}: "
            "use one of them, or pass token ids instead of text"
        )
    split_digits, regex = PRE_TOKENIZERS[pre]
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    try:
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    except Exception as e:  # the library raises nothing narrower
        raise errors.ModelError(f"the tokenizer's vocabulary and merges do not fit together: {e}") from e
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    if regex is not None:
        steps.append(pre_tokenizers.Split(Regex(regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    of_type = list(zip(tokens, token_types, strict=True))
    control = [token for token, kind in of_type if kind == TOKEN_TYPE_CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    user = [token for token, kind in of_type if kind == TOKEN_TYPE_USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user])
    return tokenizer.to_str()


class Tokenizer:
    """A model's tokenizer and chat template.

    json_text : the JSON of a `tokenizers.Tokenizer`; chat_template : Jinja source, or None; special : names such as
    "bos_token" to their text, for the template.
    """

    def __init__(self, json_text: str, chat_template: str | None = None, special: dict[str, str] | None = None):
        try:
            import tokenizers
        except ImportError as e:
            raise _missing("tokenizers", e) from e
        self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        self.chat_template = chat_template
        self.special = dict(special or {})

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised, none is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A decoder that takes one token at a time and gives text as soon as it is whole."""
        return TextStream(self._tokenizer)

    def chat(self, messages: Sequence[dict[str, str]] | str) -> str:
        """The prompt of a conversation; a string is one user message. Raises ModelError if the model has no template."""
        if self.chat_template is None:
            raise errors.ModelError("the model carries no chat template: pass plain text to encode() instead")
        try:
            import jinja2
            import jinja2.sandbox
        except ImportError as e:
            raise _missing("jinja2", e) from e
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]

        def raise_exception(message: str) -> None:
            raise errors.ArgumentError(f"the chat template refuses the messages: {message}")

        # The template comes with the model file, so it runs sandboxed.
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        env.globals["raise_exception"] = raise_exception
        env.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False, **kwargs)
        template = env.from_string(self.chat_template)
        return template.render(messages=list(messages), add_generation_prompt=True, **self.special)


class TextStream:
    """Text of a growing token list. A character of several tokens appears with its last one."""

    def __init__(self, tokenizer: Any):
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str:
        """What `token` adds, possibly nothing yet."""
        return self._stream.step(self._tokenizer, int(token)) or ""
