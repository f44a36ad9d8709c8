"""Test the parser of the webui's prompt syntax: text per step and attention weights."""

from __future__ import annotations

import random

import pytest

from dreamfleet.trainers.models.sampling.prompt_syntax import (
    attention,
    escape,
    parse_negative,
    parse_prompt,
    plain_text,
    schedule,
    split_and,
    split_tags,
    strip_comments,
    text_at,
)

W, S = 1.1, 1 / 1.1  # weights of one pair of (round) and [square] brackets
ALWAYS = 10  # sampling steps of the prompts in these tables
AB = tuple((step, "a" if step % 2 else "b") for step in range(1, 11))


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("a cat", {10: "a cat"}),
        ("", {10: ""}),
        ("[cat:dog:0.5]", {5: "cat", 10: "dog"}),
        ("a [cat:dog:3] b", {3: "a cat b", 10: "a dog b"}),
        ("[cat:dog:.25]", {2: "cat", 10: "dog"}),
        ("[cat:dog:1.]", {10: "cat"}),
        ("[cat:dog:1]", {1: "cat", 10: "dog"}),
        ("[cat:dog:0]", {10: "dog"}),
        ("[cat:dog:0.0]", {10: "dog"}),
        ("[cat:dog:-2]", {10: "dog"}),
        ("[cat:dog:99]", {10: "cat"}),
        ("[cat:dog:1.5]", {10: "cat"}),
        ("[cat:dog:3e0]", {3: "cat", 10: "dog"}),
        ("[cat:dog:+3]", {3: "cat", 10: "dog"}),
        ("[cat:dog:1e999]", {10: "cat"}),
        ("a [cat:3]", {3: "a ", 10: "a cat"}),
        ("a [cat::3]", {3: "a cat", 10: "a "}),
        ("a [: cat:3]", {3: "a ", 10: "a  cat"}),
        ("[:3]x", {3: "x", 10: "x"}),
        ("[::3]x", {3: "x", 10: "x"}),
        ("[ a : b : 2 ]", {2: " a ", 10: " b "}),
        ("[a:b:\n2\t]", {2: "a", 10: "b"}),
        ("[a:2:3]", {3: "a", 10: "2"}),
        ("[a:[b:c:6]:3]", {3: "a", 6: "b", 10: "c"}),
        ("[[a:b:2]:c:5]", {2: "a", 5: "b", 10: "c"}),
        ("[a:[b:c:2]:5]", {2: "a", 5: "a", 10: "c"}),
        ("[(a:1.3):b:5]", {5: "(a:1.3)", 10: "b"}),
        ("([a:b:5]:1.2)", {5: "(a:1.2)", 10: "(b:1.2)"}),
        ("[[a]:b:5]", {5: "[a]", 10: "b"}),
        ("[a:b:5][c:d:7]", {5: "ac", 7: "bc", 10: "bd"}),
        ("[a|b]", dict(AB)),
        ("[a:b:0.5] [c|d]", {n: f"{'a' if n < 6 else 'b'} {'c' if n % 2 else 'd'}" for n in range(1, 11)}),
        ("[a|b|]", {n: ["a", "b", ""][(n - 1) % 3] for n in range(1, 11)}),
        ("[|a]", {n: ["", "a"][(n - 1) % 2] for n in range(1, 11)}),
        ("fe[|male]", {n: ["fe", "female"][(n - 1) % 2] for n in range(1, 11)}),
        ("[a|[b|c]]", {n: ["a", ["b", "c"][(n - 1) % 2]][(n - 1) % 2] for n in range(1, 11)}),
        ("[(a:1.2)|b]", {n: ["(a:1.2)", "b"][(n - 1) % 2] for n in range(1, 11)}),
        ("[[a:b:3]|c]", {n: ["a" if n <= 3 else "b", "c"][(n - 1) % 2] for n in range(1, 11)}),
        # Not prompt syntax: the text is unchanged.
        ("a [cat] (dog)", {10: "a [cat] (dog)"}),
        ("[cat:dog]", {10: "[cat:dog]"}),
        ("[a:b:c:5]", {10: "[a:b:c:5]"}),
        ("[a:b:5 x]", {10: "[a:b:5 x]"}),
        ("[a:b:(5)]", {10: "[a:b:(5)]"}),
        ("(a:b:5)", {10: "(a:b:5)"}),
        ("a [b:c:5", {10: "a [b:c:5"}),
        ("a b:c:5]", {10: "a b:c:5]"}),
        ("[a:(b:5]", {10: "[a:(b:5]"}),
        ("([a:b:5)]", {10: "([a:b:5)]"}),
        (r"\[a:b:5\]", {10: r"\[a:b:5\]"}),
        (r"[a\:x:b:5]", {5: r"a\:x", 10: "b"}),
        ("((a [b:c:3]", {3: "((a b", 10: "((a c"}),
        ("[x [b:c:3] y", {3: "[x b y", 10: "[x c y"}),
        ("x] [b:c:3]", {3: "x] b", 10: "x] c"}),
        ("x: [b:c:3]", {3: "x: b", 10: "x: c"}),
        # An unmatched bar or backslash makes the whole text literal.
        ("a | b [c:d:5]", {10: "a | b [c:d:5]"}),
        ("(a|b) [c:d:5]", {10: "(a|b) [c:d:5]"}),
        ("[a|b:5]", {10: "[a|b:5]"}),
        ("[a|b", {10: "[a|b"}),
        ("[c:d:5] \\", {10: "[c:d:5] \\"}),
        (r"[c:d:5] \|", {5: r"c \|", 10: r"d \|"}),
        ("[猫:犬:5]的照片", {5: "猫的照片", 10: "犬的照片"}),
    ],
)
def test_texts_by_step(text: str, texts: dict[int, str]) -> None:
    assert dict(schedule(text, ALWAYS)) == texts


def test_a_text_includes_the_step_of_its_number() -> None:
    texts = [schedule("[a:b:0.5]", 4)[text_at(schedule("[a:b:0.5]", 4), index)][1] for index in range(4)]
    assert texts == ["a", "a", "a", "b"]  # the webui compares steps counted from 0 with ends counted from 1
    texts = [schedule("[a|b]", 5)[text_at(schedule("[a|b]", 5), index)][1] for index in range(5)]
    assert texts == ["a", "a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("a (cat)", [("a ", 1), ("cat", W)]),
        ("a ((cat))", [("a ", 1), ("cat", W * W)]),
        ("a [cat]", [("a ", 1), ("cat", S)]),
        ("[[cat]]", [("cat", S * S)]),
        ("a (cat:1.3) b", [("a ", 1), ("cat", 1.3), (" b", 1)]),
        ("(cat: 1.3 )", [("cat", 1.3)]),
        ("(cat:+.5)", [("cat", 0.5)]),
        ("(cat:-1)", [("cat", -1)]),
        ("(cat:0)", [("cat", 0)]),
        ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),
        ("((a:1.5))", [("a", 1.5 * W)]),
        ("(a)(b)", [("ab", W)]),
        ("(a", [("a", W)]),
        ("[a", [("a", S)]),
        ("((a", [("a", W * W)]),
        ("a)", [("a)", 1)]),
        ("a] b", [("a] b", 1)]),
        ("a:1.3)", [("a:1.3)", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", W)]),
        ("(a:b)", [("a:b", W)]),
        ("(a:)", [("a:", W)]),
        ("[a:1.3]", [("a:1.3", S)]),
        ("([a)]", [("a", W * S)]),
        ("()", [("", 1)]),
        (r"\(a\)", [("(a)", 1)]),
        (r"a \[b\]", [("a [b]", 1)]),
        (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
        (r"\\(a)", [("\\", 1), ("a", W)]),
        (r"a\b", [("ab", 1)]),
        ("a\\", [("a", 1)]),
        ("a BREAK b", [("a", 1), ("BREAK", -1), ("b", 1)]),
        ("a\nBREAK\nb", [("a", 1), ("BREAK", -1), ("b", 1)]),
        ("BREAK a", [("", 1), ("BREAK", -1), ("a", 1)]),
        ("a BREAK", [("a", 1), ("BREAK", -1), ("", 1)]),
        ("(a) BREAK [b]", [("a", W), ("", 1), ("BREAK", -1), ("", 1), ("b", S)]),
        ("aBREAK BREAKb break", [("aBREAK BREAKb break", 1)]),
        ("(a BREAK b:2)", [("a", 2), ("BREAK", -2), ("b", 2)]),  # text at this stage, as in the webui
        ("(猫:1.5)的", [("猫", 1.5), ("的", 1)]),
        ("a, (b:1.1), c", [("a, ", 1), ("b", 1.1), (", c", 1)]),
    ],
)
def test_weights(text: str, pieces: list[tuple[str, float]]) -> None:
    found = attention(text)
    assert [piece.text for piece in found] == [words for words, _ in pieces]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("a cat AND a dog", [("a cat", 1), (" a dog", 1)]),
        ("a cat :1.2 AND a dog :0.7", [("a cat", 1.2), (" a dog", 0.7)]),
        ("a AND b:-0.5", [("a", 1), (" b", -0.5)]),
        ("a AND b AND c : .5", [("a", 1), (" b", 1), (" c", 0.5)]),
        ("a AND", [("a", 1), ("", 1)]),
        ("sAND ANDs and", [("sAND ANDs and", 1)]),
        ("a (cat:1.3)", [("a (cat:1.3)", 1)]),
        ("at 16:9", [("at 16", 9)]),  # the webui reads 9 as a weight here
        ("a\nAND\nb :2\n", [("a", 1), ("\nb", 2)]),
        ("a :1.2.3", [("a :1.2.3", 1)]),
    ],
)
def test_parts_of_and(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert split_and(prompt) == parts


def test_tags_and_comments() -> None:
    text, tags = split_tags("a <lora:x:0.5:unet=0.7:dyn=2> cat <what:ever><lora:y=z=1> <x> <:3>")
    assert text == "a  cat  <x> <:3>"
    assert [tag.kind for tag in tags] == ["lora", "what", "lora"]
    assert tags[0].positional == ["x", "0.5"] and tags[0].named == {"unet": "0.7", "dyn": "2"}
    assert tags[2].positional == ["y=z=1"]
    assert split_tags("<lora:x:1> <y:z>", {"lora"})[0] == " <y:z>"
    assert strip_comments("a # b\n#c\nd#e") == "a \nd\n"
    assert [part.schedule[0][1] for part in parse_prompt("a <x:1>cat # AND b", 3)] == ["a cat"]
    assert parse_negative("a AND b <x:1>", 3) == ((3, "a AND b <x:1>"),)


def test_words_with_syntax_are_literal() -> None:
    for word in ("[V]", "(sks)", "<my:cat>", "#1", "a|b", "AND"):
        (part,) = parse_prompt(f"a ({word}:1.3) on the beach", 4, [word, "cat"])
        assert [tuple(piece) for piece in attention(part.schedule[0][1])][1] == (word, 1.3), word


SIGNS = [
    "a",
    "cat",
    " ",
    "[",
    "]",
    "(",
    ")",
    ":",
    "|",
    "\\",
    "0.5",
    "3",
    "-1",
    "BREAK",
    "AND",
    ",",
    "é",
    "猫",
    "\n",
]
SIGNS += [
    "[a:b:0.5]",
    "[a|b]",
    "(x:1.3)",
    "[x:",
    ":4]",
    "(((",
    "<lora:x:1>",
    " AND ",
    "1.",
    "<",
    ">",
    "=",
    "#",
]


def test_any_text_is_parsed_and_escaping_round_trips() -> None:
    rng = random.Random(0)
    for _ in range(1500):
        text = "".join(rng.choice(SIGNS) for _ in range(rng.randint(1, 12)))
        for part in parse_prompt(text, 4):
            assert 1 <= len(part.schedule) <= 4 and part.schedule[-1][0] == 4
            assert all(attention(text) for _, text in part.schedule)
        plain_text(text)
        (plain,) = parse_prompt(text, 4, plain=True)
        assert attention(plain.schedule[0][1]) == [(text, 1.0)], text
        if "#" not in text:  # the infotext of a plain prompt is read as that prompt
            (back,) = parse_prompt(escape(text.strip()), 4)
            assert (back.weight, attention(back.schedule[0][1])) == (1, [(text.strip(), 1.0)]), text


def test_deep_and_long_prompts_are_parsed_quickly() -> None:
    for text in (
        "[" * 3000,
        "(" * 500 + "a" + ")" * 500,
        "[a|" * 500 + "b" + "]" * 500,
        "[a:" * 500 + ":1]" * 500,
    ):
        assert schedule(text, 4)[-1][0] == 4 and attention(text)


def test_plain_text_has_no_syntax() -> None:
    prompt = "a (photo:1.3) of [a cat:sks dog:0.5], [best] <lora:x:1> BREAK on the beach AND at \\(night\\) :0.7 # x"
    assert plain_text(prompt) == "a photo of sks dog, best on the beach, at (night)"
