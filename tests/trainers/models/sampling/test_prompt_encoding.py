"""Test the encoding of prompts in the webui's syntax: token chunks, weighted parts, guidance per step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from drawing import generate
from PIL import Image
from tiny_models import WIDTH, tiny_family, tiny_model

from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.models.embeddings import install_embedding, install_negative
from dreamfleet.trainers.models.learned_words import Words, count_tokens, place_word, words_in
from dreamfleet.trainers.models.sampling.prompt_encoding import make_guides, negative_for
from dreamfleet.trainers.models.sampling.prompt_syntax import attention
from dreamfleet.trainers.models.stable_diffusion.prompt_tokens import chunk_pieces, emphasise


@pytest.fixture
def model() -> Any:
    made = tiny_model()
    install_embedding(made, "sks", torch.randn(3, WIDTH))
    return made


def chunks(model: Any, text: str) -> list[tuple[int, int]]:
    """Return (number of tokens, number of learned token ids) for each chunk."""
    found = chunk_pieces(Words(model.tokenizer, model.text_encoder), attention(text))
    assert all(len(chunk.ids) == len(chunk.weights) for chunk in found)
    first_learned = len(model.tokenizer)
    return [(len(chunk.ids), sum(token >= first_learned for token in chunk.ids)) for chunk in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [(0, 0)]),
        ("a b", [(2, 0)]),
        ("a BREAK b c", [(1, 0), (2, 0)]),
        ("a BREAK BREAK b", [(1, 0), (0, 0), (1, 0)]),
        ("a BREAK", [(1, 0)]),
        ("a " * 75, [(75, 0)]),
        ("a " * 76, [(75, 0), (1, 0)]),
        ("a " * 54 + ", " + "b " * 21, [(75, 0), (1, 0)]),  # comma 21 tokens back: too far to split
        ("a " * 55 + ", " + "b " * 20, [(56, 0), (20, 0)]),
        ("a " * 74 + ", b", [(75, 0), (1, 0)]),
        ("a " * 75 + ", b", [(75, 0), (2, 0)]),
        ("a " * 55 + ", (" + "b " * 10 + ":1.2)" + "c " * 10, [(56, 0), (20, 0)]),
        ("sks", [(3, 3)]),
        ("a " * 72 + "sks", [(75, 3)]),
        ("a " * 73 + "sks b", [(73, 0), (4, 3)]),
        ("a " * 70 + ", b b sks", [(73, 0), (3, 3)]),
        # The learned word moves to the next chunk with the other tokens.
        (
            "a " * 60 + ", " + "b " * 11 + "sks c",
            [(61, 0), (15, 3)],
        ),
    ],
)
def test_chunks_end_at_break_and_after_commas(model: Any, text: str, expected: list[tuple[int, int]]) -> None:
    assert chunks(model, text) == expected


def test_learned_words_are_found_anywhere(model: Any) -> None:
    found = [
        "a SKS",
        "sks的照片",
        "照片sks",
        "sks2",
        "x_sks",
        "sks's",
        "(sks)",
        "sks,",
        "sks는",
        "sksя",
        "asks",
    ]
    hidden = ["sksa", "s ks", "sk", "sksé"]
    assert [text for text in found + hidden if words_in(model, [text])] == found
    install_embedding(model, "小猫", torch.randn(2, WIDTH))
    install_embedding(model, "Café", torch.randn(1, WIDTH))
    assert words_in(model, ["一只小猫的照片", "a cafe\u0301"]) == {"小猫", "Café"}
    assert count_tokens(model, ["sks", "a 小猫", ""]) == [3, 3, 0]
    placed = [place_word(text, "|", "sks") for text in ("|s", "x|", "|的照片", "a | b", "|", "2|2", "||")]
    assert placed == ["sks s", "x sks", "sks的照片", "a sks b", "sks", "2sks2", "sks sks"]
    assert all(words_in(model, [text]) for text in placed)


def test_unusual_letters_match_no_other_word(model: Any) -> None:
    for word in ("İx", "ſks", "ǅ"):
        install_embedding(model, word, torch.randn(1, WIDTH))
    for text in ("ix", "İX", "ſKS", "ǆ", "sKs"):
        words_in(model, [text])  # letters whose upper case has a different length


def test_weights_restore_the_mean_of_their_chunk() -> None:
    context = torch.tensor([[[1.0, 3.0], [2.0, 2.0], [4.0, 0.0], [1.0, 1.0]]])
    weights = torch.tensor([[1.0, 2.0, 1.0, 1.0]])
    found = emphasise(context, weights, torch.ones(1), chunk=2)
    # The mean of the first chunk is 2, and 3 after weighting, so the result is multiplied by 2 / 3.
    # The second chunk has no weights.
    expected = torch.tensor([[[2 / 3, 2.0], [8 / 3, 8 / 3], [4.0, 0.0], [1.0, 1.0]]])
    assert torch.allclose(found, expected) and torch.equal(found[:, 2:], context[:, 2:])
    twice = torch.cat([context, context])
    shared = emphasise(twice, torch.cat([weights, torch.ones(1, 4)]), torch.tensor([1.0, 3.0]), chunk=2)
    # Over one weighted text and three unweighted ones: means 2 before weighting and 9 / 4 after.
    assert torch.allclose(shared[0, 1], torch.full((2,), 4 * 8 / 9)) and shared[1, 1, 0] == pytest.approx(
        16 / 9
    )


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_conditions_are_weighted_by_encoder(family: str) -> None:
    model = tiny_family(family)
    (guide,) = make_guides(model, [ImageRequest("a (cat:1.5) b", "", steps=2, guidance_scale=1)])
    plain = model.encode(["a cat b"])
    weights = torch.ones(77)
    ids, spread = model.tokenize_weighted([attention("a (cat:1.5) b")])
    side = ids[0, 0] if family == "sdxl" else ids[0]
    cat = model.tokenize(["cat"])
    length = (
        int((cat[0, 0] if family == "sdxl" else cat[0]).eq(model.tokenizer.eos_token_id).int().argmax()) - 1
    )
    weights[2 : 2 + length] = 1.5
    assert spread == [weights.tolist()] and torch.equal(side, model.tokenize(["a cat b"]).reshape(-1, 77)[0])
    expected, start = [], 0
    for encoder in model.text_encoders:
        part = plain.context[..., start : start + encoder.config.hidden_size]
        start += encoder.config.hidden_size
        wide = part * weights[:, None]
        expected.append(wide * part.mean() / wide.mean())
    found = guide.positive[0][1].at(0)
    assert torch.allclose(found.context, torch.cat(expected, dim=-1), atol=1e-4)
    if family == "sdxl":
        assert torch.equal(found.pooled, plain.pooled)


def test_long_prompts_get_more_chunks(model: Any) -> None:
    (guide,) = make_guides(model, [ImageRequest("a BREAK b AND c", "x", steps=2, guidance_scale=7)])
    (_, both), (_, short) = guide.positive
    assert both.at(0).context.shape == short.at(0).context.shape == (1, 154, WIDTH)
    assert torch.allclose(both.at(0).context[0, 77:], model.encode(["b"]).context[0], atol=1e-6)
    last = model.encode(["c"]).context[0, -1]  # a shorter part is padded by repeating its last token
    assert torch.allclose(short.at(0).context[0, 77:], last.expand(77, -1), atol=1e-6)
    assert guide.negative is not None and guide.negative.at(0).context.shape == (1, 77, WIDTH)


def draw(model: Any, *prompts: str, **options: Any) -> list[Image.Image]:
    return generate(model, prompts, **{"seeds": [1] * len(prompts), "steps": 4, **options})


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_equivalent_prompts_generate_equal_images(family: str) -> None:
    model = tiny_family(family)
    for one, other in [
        ("[a cat:a dog:0]", "a dog"),
        ("[a cat:a dog:1.0]", "a cat"),
        ("[a cat|a cat]", "a cat"),
        ("a cat AND a cat :0", "a cat"),
        ("a cat :0.5 AND a cat :0.5", "a cat"),
        ("a <lora_of:nothing> cat", "a  cat"),
        ("(a cat:1.0)", "a cat"),
    ]:
        assert difference(*draw(model, one, other)) <= 1, one
    strong = {"guidance_scale": 40}  # amplifies small differences: the tiny model reacts weakly
    assert difference(*(draw(model, "a cat", **strong)[0] for _ in range(2))) == 0
    plain = draw(model, "a cat", **strong)[0]
    for other in [
        "(a:1.4) cat",
        "[a cat:a dog:2]",
        "[a cat|a dog]",
        "a cat AND a dog",
        "a cat :0.7",
        "a BREAK cat",
    ]:
        assert difference(plain, draw(model, other, **strong)[0]) > 0, other
    assert difference(plain, draw(model, "a cat", negative_prompt="[x|y] (z:1.3)", **strong)[0]) > 0


def test_images_are_equal_in_any_batch(model: Any) -> None:
    prompts = ["a cat", "[a|b] cat AND dog :0.4", "a BREAK (b:1.2) BREAK c", "sks AND a BREAK b", "[a:b:2]"]
    together = draw(model, *prompts, batch_size=5, negative_prompt="ugly BREAK bad")
    for prompt, image in zip(prompts, together, strict=True):
        assert difference(image, draw(model, prompt, negative_prompt="ugly BREAK bad")[0]) <= 1
    # A guidance scale of 1 uses no negative prompt, except with several parts or another part weight.
    alone = draw(model, *prompts[:2], guidance_scale=1)
    assert difference(alone[0], draw(model, "a cat", guidance_scale=1, negative_prompt="ugly")[0]) == 0
    assert difference(alone[1], draw(model, prompts[1], guidance_scale=1, negative_prompt="ugly")[0]) > 0


def test_conditions_follow_the_steps(model: Any) -> None:
    (guide,) = make_guides(model, [ImageRequest("[a:b:2] AND [c|d]", "[x::1]", steps=4, guidance_scale=7)])
    (_, edited), (_, alternating) = guide.positive
    assert guide.negative is not None
    for timed, texts in ((edited, "aaab"), (alternating, "ccdc"), (guide.negative, ["x", "x", "", ""])):
        for index, text in enumerate(texts):
            assert torch.allclose(timed.at(index).context, model.encode([text]).context, atol=1e-6), (
                index,
                text,
            )


def test_guidance_sums_the_parts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorded:
        def __init__(self, scheduler: Any):
            self.inner, self.outputs = scheduler, []

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def step(self, output: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.outputs.append(output)
            return self.inner.step(output, *args, **options)

    found = {}
    for prompt, scale in [("cat", 1.0), ("dog", 1.0), ("x", 1.0), ("cat :0.5 AND dog :2", 3.0)]:
        recorded = Recorded(model.make_sampler("ddim"))
        monkeypatch.setattr(model, "make_sampler", lambda _, made=recorded: made)
        draw(model, prompt, guidance_scale=scale, negative_prompt="x", steps=1)
        monkeypatch.undo()
        found[prompt] = recorded.outputs[0]
    away = found["x"]
    expected = away + 1.5 * (found["cat"] - away) + 6 * (found["dog"] - away)
    assert torch.allclose(found["cat :0.5 AND dog :2"], expected, atol=1e-4)


def test_plain_prompts_are_literal(model: Any) -> None:
    for text in (
        "a (cat) [dog]",
        "a AND b :0.5",
        "a BREAK b",
        "<lora:x:1>",
        "# not a comment",
        "at 16:9",
        "a | b\\",
    ):
        (guide,) = make_guides(model, [ImageRequest(text, text, steps=3, guidance_scale=2, plain=True)])
        assert guide.negative is not None and len(guide.positive) == 1
        for timed in (guide.positive[0][1], guide.negative):
            assert torch.equal(timed.at(2).context, model.encode([text]).context), text


def test_negatives_of_learned_words_are_added_with_any_syntax(model: Any) -> None:
    install_negative(model, "sks", torch.randn(2, WIDTH))
    for prompt in ("a (sks:1.3)", "[a|b|sks]", "a AND [x:sks:5]", "[sks::3]", "a BREAK sks"):
        assert negative_for(model, prompt, "ugly # bad") == "ugly, sks-neg", prompt
    assert negative_for(model, "a cat # sks", "ugly") == "ugly"
    assert negative_for(model, "sks", "[a|(sks-neg:0.8)]") == "[a|(sks-neg:0.8)]"
    assert negative_for(model, "sks #", "ugly # bad", plain=True) == "ugly # bad, sks-neg"
