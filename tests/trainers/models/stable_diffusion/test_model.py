"""Test loading and saving of models, errors for missing or damaged parts, and embeddings in token tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.memory.trace import Ledger
from dreamfleet.trainers.models.embeddings import install_embedding, remove_embeddings, spliced_table
from dreamfleet.trainers.models.family import DiffusionModel, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model."""
    return tiny.make_tiny_model(tmp_path_factory.mktemp("model"))


def load(path: Path, **options: object) -> DiffusionModel:
    return load_model(ModelConfig(pretrained_model_name_or_path=str(path), **options))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder: Path, tmp_path: Path, part: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=f"'{part}' is missing"):
        load(copy)


def test_missing_or_damaged_weights_and_configs_are_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="'unet'"):
        load(copy)
    weights.unlink()
    with pytest.raises(ModelError, match="no weights"):
        load(copy)
    (copy / "vae" / "config.json").write_text("{")
    (copy / "unet" / "w.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"vae.config\.json .*JSON"):
        load(copy)


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(ModelError, match="does not exist"):
        load_model(ModelConfig(pretrained_model_name_or_path="./here"))
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ModelError, match="not a model"):
        load(tmp_path / "x.txt")


def test_saving_in_half_precision_never_copies_a_complete_part(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    whole = sum(p.numel() * p.element_size() for part in model.modules().values() for p in part.parameters())
    known = [p for part in model.modules().values() for p in (*part.parameters(), *part.buffers())]
    with Ledger(known=known) as ledger:
        model.save_folder(tmp_path / "out", dtype=torch.float16)
    assert ledger.peak < 0.6 * whole
    saved = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], tensor.half()) for name, tensor in before.items())
    assert all(torch.equal(model.unet.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_saved_pipeline_loads_in_diffusers_and_samples_the_same_image(folder: Path, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from drawing import generate

    model = load(folder)
    install_embedding(model, "<x>", torch.zeros(1, 16))
    model.save_folder(tmp_path / "out")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a cat",
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        width=tiny.RESOLUTION,
        height=tiny.RESOLUTION,
    ).images[0]
    ours = generate(load(tmp_path / "out"), ["a cat"], seeds=[5], steps=3, guidance_scale=4.0)[0]
    import numpy as np

    assert np.abs(np.asarray(theirs, int) - np.asarray(ours, int)).max() <= 1


def test_an_embedding_takes_n_ids_and_the_token_table_is_unchanged(folder: Path) -> None:
    model = load(folder)
    plain = model.tokenize(["a <x> cat"])
    table = spliced_table(model.text_encoder).weight.clone()
    install_embedding(model, "<x>", torch.randn(3, 16))
    install_embedding(model, "<x>-neg", torch.randn(2, 16))
    vocab = len(table)
    ids = model.tokenize(["a <X> cat", "<x>-neg", "a<x>b", "x"])
    assert ids.shape == (4, 77)
    assert ids[0, 2:5].tolist() == [vocab, vocab + 1, vocab + 2]
    assert ids[1, 1:3].tolist() == [vocab + 3, vocab + 4]
    assert ids[2, 2:5].tolist() == ids[0, 2:5].tolist()
    assert vocab not in ids[3].tolist()
    assert torch.equal(spliced_table(model.text_encoder).weight, table)
    assert model.encode_text(ids).shape == (4, 77, 16)
    remove_embeddings(model)
    assert torch.equal(model.tokenize(["a <x> cat"]), plain)


def test_a_prompt_without_learned_words_is_encoded_the_same(folder: Path) -> None:
    model = load(folder)
    before_ids = model.tokenize(["a photo of a cat, dog", "", "cat " * 100])
    before = model.encode_text(before_ids)
    install_embedding(model, "<x>", torch.randn(3, 16))
    ids = model.tokenize(["a photo of a cat, dog", "", "cat " * 100])
    assert torch.equal(ids, before_ids) and torch.equal(model.encode_text(ids), before)


def test_an_embedding_at_the_end_of_a_long_prompt_is_cut(folder: Path) -> None:
    model = load(folder)
    install_embedding(model, "<x>", torch.randn(4, 16))
    ids = model.tokenize(["cat " * 73 + "<x>"])[0]
    assert ids[0] == model.tokenizer.bos_token_id and ids[-1] == model.tokenizer.eos_token_id
    assert (ids >= len(model.tokenizer)).sum() == 2


def test_an_embedding_of_another_family_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="another family"):
        install_embedding(load(folder), "<x>", torch.zeros(1, 768))


def test_clip_skip_uses_the_layer_before(folder: Path) -> None:
    ids = load(folder).tokenize(["a cat"])
    one, two = load(folder), load(folder, clip_skip=2)
    hidden = one.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    expected = getattr(one.text_encoder, "text_model", one.text_encoder).final_layer_norm(hidden)
    assert torch.allclose(two.encode_text(ids), expected, atol=1e-6)
    assert not torch.allclose(two.encode_text(ids), one.encode_text(ids), atol=1e-3)


def test_long_prompts_are_encoded_in_chunks_of_75(folder: Path) -> None:
    model, short = load(folder, max_token_length=225), load(folder)
    ids = model.tokenize(["cat " * 100, "cat"])
    assert ids.shape == (2, 231)
    first, second, third = ids[0].split(77)
    for chunk, words in ((first, 75), (second, 25), (third, 0)):
        # Equals the encoding of a prompt with the words of that chunk alone.
        assert torch.equal(chunk, short.tokenize(["cat " * words])[0])
    context = model.encode_text(ids)
    assert context.shape == (2, 231, 16)
    assert torch.allclose(context[0, 77:154], short.encode_text(second[None])[0], atol=1e-6)
    assert torch.allclose(context[1, :77], short.encode_text(short.tokenize(["cat"]))[0], atol=1e-6)
    assert torch.equal(model.tokenize(["cat " * 400])[0], model.tokenize(["cat " * 225])[0])


def test_an_embedding_is_not_split_between_chunks(folder: Path) -> None:
    model = load(folder, max_token_length=150)
    install_embedding(model, "<x>", torch.randn(4, 16))
    first, second = model.tokenize(["cat " * 73 + "<x> dog"])[0].split(77)
    learned = len(model.tokenizer)
    assert (first >= learned).sum() == 0 and second[1:5].tolist() == list(range(learned, learned + 4))
    assert first[74] == first[75] == model.tokenizer.eos_token_id != second[5]
    # In the last chunk, the word's vectors are truncated like any other tokens.
    assert (model.tokenize(["cat " * 148 + "<x>"])[0] >= learned).sum() == 2
