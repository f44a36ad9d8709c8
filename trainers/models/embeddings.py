"""Placeholder words that stand for n learned vectors, spliced into the token tables of the text encoders.

The functions take a model of any family whose text encoders have a token table, as those of transformers do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.models.formats.file_names import NEGATIVE

if TYPE_CHECKING:
    from dreamfleet.trainers.models.family import DiffusionModel
    from dreamfleet.trainers.models.formats.embedding import Embedding


class SplicedEmbedding(nn.Module):
    """A token table with rows appended: ids from ``vocab_size`` on refer to the learned vectors.

    The vectors are parameters of their own. Training them leaves every row of the table bit-equal, and an optimizer
    holds states for kilobytes instead of the whole table.
    """

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.table = table
        self.words: dict[str, nn.Parameter] = {}
        # Kept separately: an engine that shards parameters leaves the vectors empty between uses.
        self.counts: dict[str, int] = {}
        #: word -> the word that belongs in the negative prompt of an image whose prompt has it
        self.negatives: dict[str, str] = {}
        #: words that belong to an applied LoRA and are removed with it
        self.lent: set[str] = set()

    @property
    def weight(self) -> Tensor:
        """The unchanged token table ``[vocab_size, D]``."""
        return self.table.weight

    def splice(self, word: str, vectors: nn.Parameter) -> None:
        """Append ``vectors`` ``[n, D]`` as the meaning of ``word``, in place of an earlier one of the same width."""
        self.words[word], self.counts[word] = vectors, len(vectors)

    def ids(self, word: str) -> range:
        """Return the ids of the word's vectors."""
        start = self.table.num_embeddings
        for known, count in self.counts.items():
            if known == word:
                return range(start, start + count)
            start += count
        raise KeyError(word)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up ``input_ids`` ``[B, T]`` -> ``[B, T, D]``."""
        vocab = self.table.num_embeddings
        if not self.words:
            return self.table(input_ids)
        is_learned = input_ids >= vocab
        base_BTD = self.table(input_ids.masked_fill(is_learned, 0))
        # The vectors are in no module tree, so they stay behind if the encoder is moved after they were spliced in.
        rows = torch.cat([vectors.to(base_BTD.device) for vectors in self.words.values()])
        learned_BTD = rows[(input_ids - vocab).clamp(min=0)].to(base_BTD.dtype)
        return torch.where(is_learned[..., None], learned_BTD, base_BTD)


def spliced_table(text_encoder: Any) -> Any:
    """Return a text encoder's token table: a :class:`SplicedEmbedding` if it has learned words."""
    return _body(text_encoder).embeddings.token_embedding


def spliced_tables(model: DiffusionModel) -> list[SplicedEmbedding]:
    """Return the token tables that have learned words, one for each text encoder, or none."""
    tables = (holder.token_embedding for holder in _holders(model))
    return [table for table in tables if isinstance(table, SplicedEmbedding)]


def token_tables(model: DiffusionModel) -> list[Tensor]:
    """Return the token table ``[vocab_size, D]`` of each text encoder."""
    return [holder.token_embedding.weight for holder in _holders(model)]


def install_embedding(
    model: DiffusionModel, word: str, vectors: Tensor, vectors_2: Tensor | None = None
) -> None:
    """Make ``word`` in a prompt stand for ``vectors`` ``[n, D]``; ``vectors_2`` are those of a second text encoder.

    Parameters are used as they are, so that they can train; other tensors are copied. Raises ModelError for vectors of
    another model family.
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
    """Install the negative of an installed word under the name ``WORD-neg``, as DreamArtist calls it.

    Sampling then adds it to the negative prompt of prompts with the word.
    """
    negative = f"{word}{NEGATIVE}"
    install_embedding(model, negative, vectors, vectors_2)
    spliced_table(model.text_encoders[0]).negatives[word] = negative


def lend_embeddings(model: DiffusionModel, embeddings: Iterable[Embedding]) -> None:
    """Install words temporarily, in place of those lent before; a word that the model has keeps its meaning.

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


def remove_embeddings(model: DiffusionModel) -> None:
    """Restore the text encoders' own token tables."""
    for holder in _holders(model):
        if isinstance(holder.token_embedding, SplicedEmbedding):
            holder.token_embedding = holder.token_embedding.table


def _holders(model: DiffusionModel) -> list[Any]:
    """Return the holders of the token tables; a text encoder without one takes no embeddings."""
    holders = (getattr(_body(encoder), "embeddings", None) for encoder in model.text_encoders)
    return [holder for holder in holders if hasattr(holder, "token_embedding")]


def _body(text_encoder: Any) -> Any:
    return getattr(text_encoder, "text_model", text_encoder)  # transformers 5 dropped this level
