"""Builds the pocket model's small BPE vocabulary and writes it as a CLIPTokenizer folder.

The words are those of the captions, of all emoji names and of the prompt templates of personalisation
methods, so that common prompts take about one token per word; single bytes encode all other text.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

from backgrounds import KEYS, say_background
from images import TEMPLATES, write_caption
from subjects import CACHE, list_subjects
from transformers import CLIPTokenizer

from dreamfleet.trainers.models.pretrained import save_tokenizer

MERGES = 1500
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Each is one token that occurs in no training caption, so that a recipe can use it as the name of a new
# subject.
RARE = ("sks", "zwx", "ohwx", "qxv")
EXTRA_WORDS = """
a the an of in on at with and or to for from by its my one this that is are was very two three many no not
photo photos picture rendering cropped close up closeup bright dark good bad cool nice weird large small big
little clean dirty depiction portrait painting drawing sketch illustration art style artist image rendition
render photograph shot view background scene colour color colours colors red orange yellow green turquoise blue
purple pink brown black white gray grey gold golden silver light striped checkered plain beach grass snow desert
night water city forest mountain mountains sky under over behind front next top garden street house room table
wearing hat eating playing sleeping running sitting standing flying swimming happy sad angry smiling crying
laughing face faces head cat cats kitten dog dogs puppy animal animals toy duck car person man woman boy girl
child people subject object thing class character style woods jungle cobblestone wooden floor wheat field tree
autumn leaves purple rug santa outfit fireman rainbow scarf shiny cube shaped wet watercolor oil pencil pixel
emoji icon cartoon 3d high quality low blurry best masterpiece detailed ugly deformed text watermark
""".split()  # noqa: SIM905


def _bytes_to_symbols() -> dict[int, str]:
    """Return GPT-2's printable symbol for each byte, in CLIP's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in kept}
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + len(symbols) - len(kept))
    return symbols


def count_words() -> Counter[str]:
    """Return the weight of each word of subject names, background phrases, templates and `EXTRA_WORDS`."""
    counts: Counter[str] = Counter()
    for subject in list_subjects():
        weight = 8 if subject.part == "train" else 3
        for word in subject.name.lower().split():
            counts[word] += weight
    for key in KEYS:
        for word in say_background(key).split():
            counts[word] += 20
    for template, _ in TEMPLATES:
        for word in write_caption("x", None, template).split():
            counts[word] += 20
    for word in EXTRA_WORDS:
        counts[word] += 10
    return Counter({word: count for word, count in counts.items() if word.isascii() and word.isalnum()})


def _join_pair(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Replace every occurrence of a pair by its concatenation."""
    joined: list[str] = []
    index = 0
    while index < len(parts):
        if index + 1 < len(parts) and (parts[index], parts[index + 1]) == pair:
            joined.append(parts[index] + parts[index + 1])
            index += 2
        else:
            joined.append(parts[index])
            index += 1
    return tuple(joined)


def learn_merges(counts: Counter[str], limit: int) -> list[tuple[str, str]]:
    """Return up to `limit` byte-pair merges, the most frequent pair first; ties are in dictionary order."""
    merges: list[tuple[str, str]] = []
    # The rare identifiers come first, so that each is one token regardless of the other words.
    for word in RARE:
        left = word[0]
        for index, letter in enumerate(word[1:], 2):
            right = letter + "</w>" if index == len(word) else letter
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    words = {(*word[:-1], word[-1] + "</w>"): count for word, count in counts.items()}
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, count in words.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_join_pair(parts, best): count for parts, count in words.items()}
    return merges


def write_tokenizer(folder: Path = CACHE / "folder" / "tokenizer") -> CLIPTokenizer:
    """Run the stage `tokenizer`: write the tokenizer, unless `tokenizer_config.json` exists already."""
    if (folder / "tokenizer_config.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    symbols = list(_bytes_to_symbols().values())
    merges = learn_merges(count_words(), MERGES)
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += [*dict.fromkeys(left + right for left, right in merges), BOS, EOS]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    save_tokenizer(tokenizer, folder)
    return CLIPTokenizer.from_pretrained(folder)
