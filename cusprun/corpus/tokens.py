"""Documents to token ids, as the model will really see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cusprun.corpus.split import text_hash
from cusprun.errors import CorpusError, ModelError, reason_of
from cusprun.progress import SILENT, Progress
from cusprun.records import Document, TokenizedDocument

_MIN_TOKENS = 2
"""A document with fewer predicts nothing."""

# Llama 3 templates print today's date unless given one; a fixed one, their own default, keeps a corpus
# and its hash the same tomorrow.
_DATE = "26 Jul 2024"


def load_tokenizer(model_dir: Path) -> Any:
    """Load the tokenizer of a local Hugging Face folder; no network, no code from the folder.

    Raises:
        ModelError: the folder has no tokenizer, or one that cannot be loaded.
    """
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir} is not a folder with a model; check the path")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its parser raises
        raise ModelError(
            f"the tokenizer in {model_dir} cannot be loaded ({reason_of(error)}); "
            "the folder needs the tokenizer files of the model"
        ) from None


def tokenize(
    documents: Sequence[Document], tokenizer: Any, max_tokens: int, progress: Progress = SILENT
) -> tuple[TokenizedDocument, ...]:
    """Tokenise documents with a transformers tokenizer, in their order, each cut at ``max_tokens`` tokens.

    A plain text gets the special tokens that the tokenizer adds. A chat goes through the model's own chat
    template, which brings its special tokens itself; when the tokenizer has none, it is read as paragraphs
    ``role: content``. Documents of fewer than two tokens are left out.

    Raises:
        CorpusError: the chat template refuses a chat.
    """
    tokenized = []
    with progress.stage("tokenising documents", len(documents), "document") as advance:
        for document in documents:
            ids = _token_ids(document, tokenizer)[:max_tokens]
            if len(ids) >= _MIN_TOKENS:
                tokenized.append(TokenizedDocument(document.dimension, text_hash(document), tuple(ids)))
            advance(1)
    return tuple(tokenized)


def _token_ids(document: Document, tokenizer: Any) -> list[int]:
    if not document.messages:
        return _encode(tokenizer, document.text, special=True)
    if not tokenizer.chat_template:
        paragraphs = [f"{message.role}: {message.content}" for message in document.messages]
        return _encode(tokenizer, "\n\n".join(paragraphs), special=True)
    return _encode(tokenizer, _chat_text(document, tokenizer), special=False)


def _chat_text(document: Document, tokenizer: Any) -> str:
    messages = [{"role": message.role, "content": message.content} for message in document.messages]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, date_string=_DATE)
    except Exception as error:  # a template is a program of the model's, and raises what it likes
        roles = ", ".join(message.role for message in document.messages)
        raise CorpusError(
            f"the model's chat template refuses a chat of the {document.dimension} corpus with the roles "
            f"{roles} ({reason_of(error)}); change the roles or use a text template"
        ) from None
    return text


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    # verbose=False: a text longer than the model's context is cut by the caller, no cause for a warning.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
