"""Models read from files: GGUF weights, their sizes, tokenizer and chat template. Needs the extra `llm`."""

from .gguf import LanguageModel, find_smollm2, load_gguf
from .llama import LlamaConfig
from .tokenizer import Tokenizer

__all__ = ["LanguageModel", "LlamaConfig", "Tokenizer", "find_smollm2", "load_gguf"]
