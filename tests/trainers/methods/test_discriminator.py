"""Test the discriminator: all label formats, held-out images, reproducible training, its run and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import DataError, RecipeError, UserError
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.index.labels import (
    find_labels,
    hold_out,
    label_of,
    parse_labels,
    read_labels,
    write_labels,
)
from dreamfleet.trainers.artifacts.usage import describe
from dreamfleet.trainers.batches.plan_share import PlanShare
from dreamfleet.trainers.driver.preflight import check_inputs
from dreamfleet.trainers.memory.profile import method_shape
from dreamfleet.trainers.models.vision.discriminator import load_discriminator, make_network, save_network
from dreamfleet.trainers.recipe import build_recipe, load_recipe
from dreamfleet.trainers.run.build import DistributedContext, Parts, assemble
from dreamfleet.trainers.run.run import run_worker

SECTION = {**tiny.DISCRIMINATOR, "hidden_sizes": [16, 32], "drop_path": 0.1}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with forty labelled images of two classes, and without a model."""
    folder = tmp_path_factory.mktemp("discriminator")
    tiny.make_two_classes(folder / "pictures", 40)
    return folder


def make_tree(folder: Path, section: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    options = {"train__train_batch_size": 8, "optimizer__learning_rate": 3e-3, **changes}
    # The empty folder keeps make_recipe from creating a model, since the method does not read one.
    (folder / "model").mkdir(exist_ok=True)
    tree = tiny.make_recipe(folder, method={**SECTION, **(section or {})}, **options)
    del tree["model"]
    return tree


def make_parts(folder: Path, section: dict[str, Any] | None = None, **changes: Any) -> Parts:
    return assemble(build_recipe(make_tree(folder, section, **changes)), DistributedContext())


# ---- labels ------------------------------------------------------------------------------------------------


def test_labels_have_the_format_of_the_original(tmp_path: Path) -> None:
    path = str(tmp_path / "dataset.json")
    write_labels(path, {"a.png": 1, "ü b.jpg": 0})
    assert json.loads(Path(path).read_text("utf-8")) == {"a.png": 1, "ü b.jpg": 0} == read_labels(path)
    with pytest.raises(DataError, match=r"labels: .*gone.json"):
        read_labels(str(tmp_path / "gone.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a.png": 1', "JSON"),
        ("[1, 2]", "not a file of labels"),
        ('{"a.png": "good"}', "'a.png' .*\"good\""),
        ('{"a.png": true}', " true,"),
        ('{"a.png": -1}', " -1"),
        ('{"a.png": 1.5}', " 1.5"),
    ],
)
def test_invalid_label_files_are_reported(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_labels(text, "x.json")


@given(
    st.text(max_size=30)
    | st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists).map(json.dumps)
)
def test_any_text_is_labels_or_a_clear_error(text: str) -> None:
    try:
        assert isinstance(parse_labels(text, "x.json"), dict)
    except DataError:
        pass


def test_a_label_is_found_by_whole_name_last_part_or_folder() -> None:
    assert label_of("a/b.png", {"a/b.png": 2, "b.png": 1}) == 2 and label_of("a/b.png", {"b.png": 1}) == 1
    assert label_of("a/b.png", {}) is None and label_of("1/b.png", {}) is None
    assert label_of("1/b.png", None) == 1 and label_of("0/sea/2/x/b.png", None) == 2
    assert label_of("b.png", None) is None and label_of("²/b.png", None) is None


def test_held_out_images_are_deterministic_and_duplicates_are_not_split(tmp_path: Path) -> None:
    tiny.make_two_classes(tmp_path, 30)
    (tmp_path / "copies").mkdir()
    for number in range(0, 30, 3):
        name = f"{number:03d}.png"
        (tmp_path / "copies" / name).write_bytes((tmp_path / name).read_bytes())
    index = build_index(str(tmp_path))
    labels = find_labels(index, [str(tmp_path)])
    assert len(labels) == 40, "copies are labelled by their file name"
    held = hold_out(index, labels, 2)
    assert held == hold_out(index, labels, 2) and set(held.values()) == {0, 1}
    hashes = index.column("sha256")
    assert not {hashes[row] for row in held} & {hashes[row] for row in labels if row not in held}
    assert len(hold_out(index, labels, 50)) <= 40 / 5 + 4 and not hold_out(index, labels, 0)


# ---- image selection ---------------------------------------------------------------------------------------


def test_folders_and_two_json_files_define_the_split(workplace: Path, tmp_path: Path) -> None:
    source = workplace / "pictures"
    labels = json.loads((source / "dataset.json").read_text())
    for name, label in labels.items():
        (tmp_path / "sorted" / str(label)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sorted" / str(label) / name).write_bytes((source / name).read_bytes())
    by_folder = make_parts(workplace, data__instance_data_dir=str(tmp_path / "sorted"))
    by_json = make_parts(workplace)
    assert by_folder.sets.instances.content_hash == by_json.sets.instances.content_hash
    assert by_json.held_out is not None and len(by_json.held_out) == 8 and len(by_json.sets.instances) == 32
    names = sorted(labels)
    write_labels(str(tmp_path / "train.json"), {name: labels[name] for name in names[:20]})
    write_labels(str(tmp_path / "test.json"), {name: labels[name] for name in names[15:25]})
    jsons = {"labels": str(tmp_path / "train.json"), "test_labels": str(tmp_path / "test.json")}
    split = make_parts(workplace, jsons)
    seen = [Path(uri).name for uri in split.sets.instances.column("uri")]
    assert sorted(seen) == names[:15] and split.held_out is not None and len(split.held_out) == 10
    assert set(split.sets.instances.column("caption")) == {"warm", "cold"}


def test_the_data_hash_includes_labels(workplace: Path) -> None:
    swapped = make_parts(workplace, {"classes": ["cold", "warm"]})
    assert swapped.sets.instances.content_hash != make_parts(workplace).sets.instances.content_hash


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "0 .*data label"),
        ({"000.png": 0, "002.png": 0}, "1 classes"),
        ({"000.png": 0, "001.png": 1, "002.png": 2}, "class 2.*method.classes .*0 to 1"),
    ],
)
def test_unusable_labels_are_errors(
    labels: dict[str, int], message: str, workplace: Path, tmp_path: Path
) -> None:
    write_labels(str(tmp_path / "labels.json"), labels)
    with pytest.raises(DataError, match=message):
        make_parts(workplace, {"labels": str(tmp_path / "labels.json")})


def test_augmentation_is_deterministic_and_not_applied_in_validation(workplace: Path) -> None:
    section = {"color_jitter": 0.5}
    feeds = [make_parts(workplace, section, data__random_flip=True).feed for _ in range(2)]
    first, again, later = feeds[0].batch(0), feeds[1].batch(0), feeds[0].batch(4)
    assert torch.equal(first["pixels"], again["pixels"]) and first["pixels"].shape == (8, 3, 32, 32)
    ids = [
        feed._read.samples[draw.row].id
        for feed in feeds[:1]
        for step in (0, 4)
        for draw in feed.plan.draws(step)
    ]
    shared = [(n, ids[8:].index(i)) for n, i in enumerate(ids[:8]) if i in ids[8:]]
    assert shared and all(not torch.equal(first["pixels"][a], later["pixels"][b]) for a, b in shared)
    parts = make_parts(workplace, section, data__random_flip=True)
    plain = make_parts(workplace, {"color_jitter": 0.0})
    use = parts.feed._read(3)
    assert torch.equal(parts.method.collate([use])["pixels"], plain.method.collate([use])["pixels"])


@pytest.mark.parametrize("rank", [0, 1])
def test_two_workers_share_the_images(rank: int, workplace: Path) -> None:
    alone, half = make_parts(workplace).feed, make_parts(workplace, train__train_batch_size=4).feed
    half.share = PlanShare(alone.plan, 2)
    whole, mine = alone.batch(1), half.batch(1, rank)
    for name in ("pixels", "labels"):
        assert torch.equal(mine[name], whole[name][4 * rank : 4 * rank + 4])


def test_balanced_classes_have_equal_weight(workplace: Path, tmp_path: Path) -> None:
    labels = read_labels(str(workplace / "pictures" / "dataset.json"))
    few = [name for name, label in labels.items() if label == 1][4:]
    write_labels(str(tmp_path / "l.json"), {name: label for name, label in labels.items() if name not in few})
    section = {"labels": str(tmp_path / "l.json"), "holdout_per_class": 0, "balance_classes": True}
    parts = make_parts(workplace, section, train__train_batch_size=24)
    batch = parts.feed.batch(0)
    assert parts.held_out is None and torch.bincount(batch["labels"]).tolist() == [20, 4]
    losses = parts.method(batch).per_sample
    share = [float(losses[batch["labels"] == number].sum()) for number in (0, 1)]
    assert share[0] == pytest.approx(share[1], rel=0.05), (
        "an untrained head gives every picture the same loss"
    )


# ---- training ----------------------------------------------------------------------------------------------


def test_a_run_learns_the_classes_and_reports_accuracy(workplace: Path, tmp_path: Path) -> None:
    tree = make_tree(
        workplace, train__max_train_steps=40, train__train_batch_size=16, output_dir=str(tmp_path / "run")
    )
    recipe = tiny.write_recipe(tmp_path / "r.yaml", {**tree, "validation": {"steps": 20}})
    result = CliRunner().invoke(program.app, ["train", str(recipe), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    figures, run = answer["summary"]["figures"], tmp_path / "run"
    assert figures["accuracy"] >= 0.9 and figures["holdout_loss"] < 0.5
    assert {"accuracy/warm", "accuracy/cold"} <= figures.keys()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [(line["step"], line["holdout_loss"]) for line in lines if "accuracy" in line]
    assert [step for step, _ in measured] == [0, 20, 40] and measured[2][1] < measured[0][1]
    report = (run / "report.html").read_text()
    assert "Held-out accuracy" in report and "classifier" in report
    assert not list((run / "samples").glob("step-*")) and answer["summary"]["base_model"] == "random weights"
    judge = load_discriminator(str(run / "exports" / "run"))
    assert judge.network.config.id2label == {0: "warm", 1: "cold"} and judge.preprocessing.resize == (32, 32)
    images = [Image.open(workplace / "pictures" / f"{number:03d}.png") for number in range(8)]
    likely = judge.network(pixel_values=judge.preprocessing(images)).logits.softmax(-1)
    assert likely.argmax(1).tolist() == [0, 1] * 4
    exported = CliRunner().invoke(
        program.app, ["export", str(run), "--format", "pth", "--out", str(tmp_path / "out")]
    )
    assert exported.exit_code == 0, exported.output
    assert load_discriminator(str(tmp_path / "out" / "run.pth")).num_classes == 2
    scored = CliRunner().invoke(program.app, ["score", str(run)])
    assert scored.exit_code == 2


def test_a_resumed_run_writes_the_same_file(workplace: Path, tmp_path: Path) -> None:
    for name in ("straight", "broken"):
        # Stochastic depth drops random paths; a resumed run has to drop the same ones.
        section = {"drop_path": 0.5, "depths": [2, 2]}
        tree = make_tree(
            workplace, section, train__max_train_steps=6, output_dir=str(tmp_path / name / "judge")
        )
        if name == "broken":
            assert run_worker(build_recipe(tree), should_stop=tiny.Stop(2)).exit_reason == "interrupted"
        assert run_worker(build_recipe(tree), resume=name == "broken").steps == 6
    files = [tmp_path / name / "judge/exports/judge/model.safetensors" for name in ("straight", "broken")]
    states = [load_discriminator(str(file.parent)).network.state_dict() for file in files]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_training_continues_from_another_classifier_with_a_new_head(workplace: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = make_network(depths=[1, 2], hidden_sizes=[8, 16], classes=["x", "y", "z"], drop_path=0.0)
    save_network(network, tmp_path / "x", size=64, dtype=torch.float32, metadata={})
    parts = make_parts(workplace, {"convnext": str(tmp_path / "x"), "drop_path": 0.3})
    mine, theirs = parts.method.network.state_dict(), network.state_dict()
    assert mine["classifier.weight"].shape == (2, 16)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if "classifier" not in name)
    assert parts.method.network.config.drop_path_rate == 0.3 and parts.method.base.name == str(tmp_path / "x")
    save_network(parts.method.network, tmp_path / "own", size=32, dtype=torch.float32, metadata={})
    again = make_parts(workplace, {"convnext": str(tmp_path / "own")})
    assert torch.equal(again.method.network.classifier.weight, parts.method.network.classifier.weight)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(precision: str, workplace: Path) -> None:
    found = []
    for batch, micros in ((8, 1), (2, 4)):
        parts = make_parts(
            workplace,
            {"drop_path": 0.0},
            train__train_batch_size=batch,
            train__gradient_accumulation_steps=micros,
            train__mixed_precision=precision,
        )
        for micro in range(micros):
            parts.engine.backward(parts.prepare(parts.feed.batch(0, micro)), last=micro == micros - 1)
        found.append([param.grad.clone() for param in parts.engine.params.values()])
    tolerance = 1e-6 if precision == "no" else 1e-2
    assert all(torch.allclose(a, b, rtol=1e-2, atol=tolerance) for a, b in zip(*found, strict=True))


# ---- recipes and commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"validation__prompts": ["a cat"]},
            "validation.prompts: .*discriminator",
        ),
        ({"validation__holdout": "x"}, "method.test_labels or method.holdout_per_class"),
        ({"train__gradient_checkpointing": True}, "train.gradient_checkpointing: True"),
        ({"section": {"classes": ["a"]}}, "method.classes"),
        ({"section": {"classes": ["a", "a"]}}, "twice"),
        ({"section": {"depths": [1]}}, "stage"),
        ({"section": {"depths": [1] * 5, "hidden_sizes": [8] * 5}}, "64 pixels"),
    ],
)
def test_an_invalid_recipe_is_an_error(changes: dict[str, Any], message: str, workplace: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe(make_tree(workplace, **changes))


def test_a_search_can_optimise_its_metrics(workplace: Path) -> None:
    space = {"optimizer.learning_rate": {"distribution": "choice", "values": [1e-3, 1e-2]}}
    search = {"space": space, "num_trials": 2, "metric": "accuracy"}
    assert build_recipe(make_tree(workplace, search=search)).search.maximise
    with pytest.raises(RecipeError, match="measured"):
        build_recipe(
            make_tree(
                workplace,
                search={
                    **search,
                    "space": {
                        "method.holdout_per_class": {"distribution": "randint", "lower": 1, "upper": 5}
                    },
                },
            )
        )


def test_paths_are_relative_to_the_recipe_and_missing_ones_reported_early(
    workplace: Path, tmp_path: Path
) -> None:
    tree = make_tree(workplace, {"labels": "labels.json", "convnext": "facebook/convnext-tiny-384-22k-1k"})
    recipe = load_recipe(tiny.write_recipe(tmp_path / "r.yaml", tree))
    assert recipe.method.labels == str(tmp_path / "labels.json")
    assert recipe.method.convnext == "facebook/convnext-tiny-384-22k-1k"
    with pytest.raises(RecipeError, match=r"method\.labels: .*labels\.json"):
        check_inputs(recipe)


def test_commands_check_plan_methods_and_hints(workplace: Path, tmp_path: Path) -> None:
    tree = make_tree(workplace, output_dir=str(tmp_path / "run"))
    checked = CliRunner().invoke(program.app, ["check", str(tiny.write_recipe(tmp_path / "r.yaml", tree))])
    assert checked.exit_code == 0, checked.output
    assert "ConvNeXt" in checked.output
    with pytest.raises(UserError, match="plan: discriminator"):
        method_shape(build_recipe(tree))
    listed = CliRunner().invoke(program.app, ["methods"]).output
    assert "discriminator        For prompt_tuning. " in listed
    assert "DreamArtist" in describe("run.pth", run_name="run", recipe=tree).what


def test_shipped_labels_name_shipped_images(root: Path) -> None:
    recipe = load_recipe(root / "recipes" / "cat-discriminator.yaml")
    names = [read_labels(distributed) for distributed in (recipe.method.labels, recipe.method.test_labels)]
    assert not names[0].keys() & names[1].keys()
    for labels in names:
        assert set(labels.values()) == set(range(len(recipe.method.classes)))
        assert all((root / "examples" / name).is_file() for name in labels)
