"""Adds learned words (textual inversion embeddings of n vectors) to the token tables of a model's text encoders.

Works with models of any family whose text encoders have a token table, such as those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.models.formats.file_names import NEGATIVE

if TYPE_CHECKING:
    from dreamfleet.trainers.models.family import DiffusionModel
    from dreamfleet.trainers.models.formats.embedding import Embedding


class SplicedEmbedding(nn.Module):
    """A token table with additional rows: ids from ``vocab_size`` on refer to the learned vectors.

    The vectors are separate parameters, so training them leaves the table bit-equal, and the optimizer needs states
    only for the vectors instead of the whole table.
    """

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.table = table
        self.words: dict[str, nn.Parameter] = {}
        # Stored separately, because an engine that shards parameters leaves the vectors empty between uses.
        self.counts: dict[str, int] = {}
        #: word -> the word to add to the negative prompt if it occurs in the prompt
        self.negatives: dict[str, str] = {}
        #: words of applied LoRAs, which are removed together with the LoRAs
        self.lent: set[str] = set()

    @property
    def weight(self) -> Tensor:
        """The unchanged token table ``[vocab_size, D]``."""
        return self.table.weight

    def splice(self, word: str, vectors: nn.Parameter) -> None:
        """Add a word with its ``vectors`` ``[n, D]``, or replace the vectors of an existing word."""
        self.words[word], self.counts[word] = vectors, len(vectors)

    def ids(self, word: str) -> range:
        """Return the token ids of a word's vectors. Raises KeyError for an unknown word."""
        start = self.table.num_embeddings
        for known, count in self.counts.items():
            if known == word:
                return range(start, start + count)
            start += count
        raise KeyError(word)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows of the table and of the learned vectors for ids ``[B, T]``: ``[B, T, D]``."""
        vocab = self.table.num_embeddings
        if not self.words:
            return self.table(input_ids)
        is_learned = input_ids >= vocab
        base_BTD = self.table(input_ids.masked_fill(is_learned, 0))
        # The vectors are not registered in this module, so moving the encoder does not move them.
        rows = torch.cat([vectors.to(base_BTD.device) for vectors in self.words.values()])
        learned_BTD = rows[(input_ids - vocab).clamp(min=0)].to(base_BTD.dtype)
        return torch.where(is_learned[..., None], learned_BTD, base_BTD)


def spliced_table(text_encoder: Any) -> Any:
    """Return a text encoder's token table: a :class:`SplicedEmbedding` if it has learned words."""
    return _body(text_encoder).embeddings.token_embedding


def spliced_tables(model: DiffusionModel) -> list[SplicedEmbedding]:
    """Return the token tables with learned words, one per text encoder; [] if the model has no learned words."""
    tables = (holder.token_embedding for holder in _holders(model))
    return [table for table in tables if isinstance(table, SplicedEmbedding)]


def token_tables(model: DiffusionModel) -> list[Tensor]:
    """Return the token table ``[vocab_size, D]`` of each text encoder."""
    return [holder.token_embedding.weight for holder in _holders(model)]


def install_embedding(
    model: DiffusionModel, word: str, vectors: Tensor, vectors_2: Tensor | None = None
) -> None:
    """Add ``word`` to the model's vocabulary, with ``vectors`` ``[n, D]`` as its embedding.

    ``vectors_2`` are the vectors for a second text encoder. An nn.Parameter is used directly, so that it can be
    trained; other tensors are copied. Raises ModelError for vectors of another model family and for an empty word.
    """
    given = [vectors] if vectors_2 is None else [vectors, vectors_2]
    widths = [table.shape[1] for table in token_tables(model)]
    fits = [tensor.shape[1:] for tensor in given] == [(width,) for width in widths]
    if not fits or len(set(map(len, given))) > 1:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in given)
        wanted = " and ".join(f"[n, {width}]" for width in widths) or "no embeddings"
        raise ModelError(
            f"the embedding {word!r} has shape {shapes}, but {model.folder} takes {wanted}; it was made for another "
            "family of models"
        )
    if not word.strip():
        raise ModelError("an embedding needs a word that stands for it in prompts")
    for holder, tensor in zip(_holders(model), given, strict=True):
        if not isinstance(holder.token_embedding, SplicedEmbedding):
            holder.token_embedding = SplicedEmbedding(holder.token_embedding)
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().clone())
        holder.token_embedding.splice(word, parameter)


def install_negative(
    model: DiffusionModel, word: str, vectors: Tensor, vectors_2: Tensor | None = None
) -> None:
    """Add the negative vectors of a learned word as the word ``WORD-neg`` (DreamArtist's name for it).

    Sampling then adds ``WORD-neg`` to the negative prompt if the prompt contains ``WORD``. Raises ModelError as
    :func:`install_embedding`.
    """
    negative = f"{word}{NEGATIVE}"
    install_embedding(model, negative, vectors, vectors_2)
    spliced_table(model.text_encoders[0]).negatives[word] = negative


def lend_embeddings(model: DiffusionModel, embeddings: Iterable[Embedding]) -> None:
    """Replace the words of previously applied LoRAs by ``embeddings``; words that the model already has are kept.

    Raises ModelError for vectors of another model family.
    """
    for holder in _holders(model):
        spliced = holder.token_embedding
        if isinstance(spliced, SplicedEmbedding):
            for word in spliced.lent:
                del spliced.words[word], spliced.counts[word]
            spliced.lent.clear()
            if not spliced.words:
                holder.token_embedding = spliced.table
    for embedding in embeddings:
        if any(embedding.name in table.words for table in spliced_tables(model)):
            continue
        device = model.text_device
        second = embedding.vectors_2
        install_embedding(
            model, embedding.name, embedding.vectors.to(device), None if second is None else second.to(device)
        )
        for table in spliced_tables(model):
            table.lent.add(embedding.name)


def replace_table(model: DiffusionModel, side: int, make: Callable[[Any], nn.Module]) -> None:
    """Replace the token table of text encoder number ``side`` by ``make(table)``."""
    holder = _holders(model)[side]
    holder.token_embedding = make(holder.token_embedding)


def remove_embeddings(model: DiffusionModel) -> None:
    """Remove all learned words from the text encoders."""
    for holder in _holders(model):
        if isinstance(holder.token_embedding, SplicedEmbedding):
            holder.token_embedding = holder.token_embedding.table


def _holders(model: DiffusionModel) -> list[Any]:
    """Return the modules that own the token tables; text encoders without a token table are left out."""
    holders = (getattr(_body(encoder), "embeddings", None) for encoder in model.text_encoders)
    return [holder for holder in holders if hasattr(holder, "token_embedding")]


def _body(text_encoder: Any) -> Any:
    return getattr(text_encoder, "text_model", text_encoder)  # transformers 5 removed this level
