"""Placeholder words that stand for n learned vectors, spliced into the input of the text encoder, of SDXL's both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.models.formats.file_names import NEGATIVE

if TYPE_CHECKING:
    from dreamfleet.trainers.models.formats.embedding import Embedding
    from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion


class SplicedEmbedding(nn.Module):
    """A token table with rows appended: ids from ``vocab_size`` on read the learned vectors.

    The vectors are Parameters of their own, so training them leaves every row of the table bit-equal, and an optimizer
    holds states for kilobytes instead of the whole table.
    """

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.table = table
        self.words: dict[str, nn.Parameter] = {}
        # Kept apart: where an engine shards parameters, the vectors are empty between uses.
        self.counts: dict[str, int] = {}
        #: the word that belongs into the negative prompt of whoever uses a word
        self.negatives: dict[str, str] = {}
        #: words that came with a LoRA and leave with it
        self.lent: set[str] = set()

    @property
    def weight(self) -> Tensor:
        """The untouched token table ``[vocab_size, D]``."""
        return self.table.weight

    def splice(self, word: str, vectors: nn.Parameter) -> None:
        """Append ``vectors`` ``[n, D]`` as the meaning of ``word``; replaces an earlier meaning of the same width."""
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
        # In no module tree, so an encoder that was moved after its words were installed has not moved them.
        rows = torch.cat([vectors.to(base_BTD.device) for vectors in self.words.values()])
        learned_BTD = rows[(input_ids - vocab).clamp(min=0)].to(base_BTD.dtype)
        return torch.where(is_learned[..., None], learned_BTD, base_BTD)


def text_embeddings(text_encoder: Any) -> Any:
    """Return the module that holds ``token_embedding``; transformers 5 dropped its ``text_model`` level."""
    return getattr(text_encoder, "text_model", text_encoder).embeddings


def spliced_table(text_encoder: Any) -> Any:
    """Return a text encoder's token table: a :class:`SplicedEmbedding` where it was taught words."""
    return text_embeddings(text_encoder).token_embedding


def token_tables(model: StableDiffusion) -> list[Tensor]:
    """Return the token table ``[vocab_size, D]`` of each text encoder."""
    return [text_embeddings(encoder).token_embedding.weight for encoder in model.text_encoders]


def install_embedding(
    model: StableDiffusion, word: str, vectors: Tensor, vectors_2: Tensor | None = None
) -> None:
    """Teach ``model`` that ``word`` in a prompt means ``vectors`` ``[n, D]``.

    ``vectors_2`` are SDXL's, in its second encoder. Parameters are used as they are, so that they can learn; other
    tensors are copied. Raises ModelError for vectors of another family.
    """
    given = [vectors] if vectors_2 is None else [vectors, vectors_2]
    widths = [table.shape[1] for table in token_tables(model)]
    if [tensor.shape[1:] for tensor in given] != [(width,) for width in widths] or len(
        set(map(len, given))
    ) > 1:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in given)
        wanted = " and ".join(f"[n, {width}]" for width in widths)
        raise ModelError(
            f"the embedding {word!r} has shape {shapes}, but {model.folder} reads {wanted}; it was made for another "
            "family of models"
        )
    if not word.strip():
        raise ModelError("an embedding needs a word that stands for it in prompts")
    for encoder, tensor in zip(model.text_encoders, given, strict=True):
        holder = text_embeddings(encoder)
        if not isinstance(holder.token_embedding, SplicedEmbedding):
            holder.token_embedding = SplicedEmbedding(holder.token_embedding)
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().clone())
        holder.token_embedding.splice(word, parameter)


def install_negative(
    model: StableDiffusion, word: str, vectors: Tensor, vectors_2: Tensor | None = None
) -> None:
    """Teach ``model`` the negative of an installed word under the name ``WORD-neg``, as DreamArtist calls it.

    :func:`prompt_tokens.negative_for` then puts it into negative prompts.
    """
    negative = f"{word}{NEGATIVE}"
    install_embedding(model, negative, vectors, vectors_2)
    text_embeddings(model.text_encoder).token_embedding.negatives[word] = negative


def lend_embeddings(model: StableDiffusion, embeddings: Iterable[Embedding]) -> None:
    """Teach ``model`` words for a time, in place of those lent before; a word that it knows keeps its meaning.

    Raises ModelError for vectors of another family.
    """
    for holder in map(text_embeddings, model.text_encoders):
        spliced = holder.token_embedding
        if isinstance(spliced, SplicedEmbedding):
            for word in spliced.lent:
                del spliced.words[word], spliced.counts[word]
            spliced.lent.clear()
            if not spliced.words:
                holder.token_embedding = spliced.table
    for embedding in embeddings:
        tables = [text_embeddings(encoder).token_embedding for encoder in model.text_encoders]
        if any(embedding.name in getattr(table, "words", ()) for table in tables):
            continue
        place = tables[0].weight.device
        second = embedding.vectors_2
        install_embedding(
            model, embedding.name, embedding.vectors.to(place), None if second is None else second.to(place)
        )
        for encoder in model.text_encoders:
            text_embeddings(encoder).token_embedding.lent.add(embedding.name)


def remove_embeddings(model: StableDiffusion) -> None:
    """Give the text encoders their own token tables back."""
    for holder in map(text_embeddings, model.text_encoders):
        if isinstance(holder.token_embedding, SplicedEmbedding):
            holder.token_embedding = holder.token_embedding.table
