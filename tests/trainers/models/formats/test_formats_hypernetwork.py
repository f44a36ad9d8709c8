"""Test hypernetwork files: round trips, the webui's checks and layout, old forms, malicious files."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import SCALARS, TENSORS, assert_survives, damaged, saved, torch_files
from hypothesis import strategies as st
from webui_safety import assert_webui_safe

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.config.hypernetwork_structure import Structure
from dreamfleet.trainers.models.formats.hypernetwork import (
    HypernetworkFile,
    holds_hypernetwork,
    read_hypernetwork,
    write_hypernetwork,
)
from dreamfleet.trainers.models.formats.pickle_writer import load_pickle, save_pickle
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import Hypernetwork

KEYS = {
    "step", "name", "layer_structure", "activation_func", "is_layer_norm", "weight_initialization", "sd_checkpoint",
    "sd_checkpoint_name", "activate_output", "use_dropout", "dropout_structure", "last_layer_dropout", "optional_info",
}  # fmt: skip


def make_file(**options: Any) -> HypernetworkFile:
    torch.manual_seed(0)
    network = Hypernetwork([8, 12], Structure(**options))
    return network.to_file(
        "look",
        step=200,
        sd_checkpoint="0123456789",
        sd_checkpoint_name="pocket",
        metadata={"recipe": "a: [1]\nb: ü"},
    )


def weights(width: int, *, inner: int | None = None, names: tuple[str, str] = ("linear1", "linear2")) -> Any:
    """Return the state dict of the oldest form: linear layers from ``width`` to ``inner`` and back."""
    inner = inner or 2 * width
    shapes = {"weight": [(inner, width), (width, inner)], "bias": [(inner,), (width,)]}
    return {f"{names[i]}.{part}": torch.randn(shapes[part][i]) for i in range(2) for part in shapes}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_structure": (1, 0.5, 1), "activation_func": "swish", "weight_init": "KaimingNormal"},
        {
            "layer_structure": (1, 2, 2, 1),
            "activation_func": "prelu",
            "add_layer_norm": True,
            "activate_output": True,
            "dropout_structure": (0, 0.3, 0.1, 0),
        },
    ],
)
def test_a_file_round_trips_and_passes_the_webui_checks(options: dict[str, Any], tmp_path: Path) -> None:
    written = make_file(**options)
    path = write_hypernetwork(written, tmp_path / "look.pt")
    assert_webui_safe(path)
    read = read_hypernetwork(path)
    assert read.structure == written.structure
    assert (read.name, read.step, read.sd_checkpoint, read.sd_checkpoint_name, read.metadata) == (
        "look", 200, "0123456789", "pocket", written.metadata,
    )  # fmt: skip
    network = Hypernetwork.from_file(read)
    mine, theirs = Hypernetwork.from_file(written).state_dict(), network.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert holds_hypernetwork(path)


def test_the_layout_is_that_of_the_webui(tmp_path: Path) -> None:
    options = {"layer_structure": (1, 2, 2, 1), "activation_func": "relu", "add_layer_norm": True}
    dropout = {"activate_output": True, "dropout_structure": (0, 0.3, 0.3, 0)}
    path = write_hypernetwork(make_file(**options, **dropout), tmp_path / "look.pt")
    data = torch.load(path, weights_only=True)
    assert {key for key in data if isinstance(key, str)} == KEYS | {"dreamfleet"}
    assert {key for key in data if not isinstance(key, str)} == {8, 12}
    assert all(type(key) in (int, str) for key in data)
    assert (data["use_dropout"], data["last_layer_dropout"]) == (True, True)
    for pair in (data[8], data[12]):
        assert type(pair) is tuple and len(pair) == 2 and all(type(module) is dict for module in pair)
    # Numbered as in the webui's Sequential, in which activations and dropout count as layers.
    places = {int(name.split(".")[1]) for name in data[8][0]}
    assert places == {0, 2, 4, 6, 8, 10}
    assert data[8][0]["linear.0.weight"].shape == (16, 8)


def test_old_forms_get_the_webui_defaults(tmp_path: Path) -> None:
    bare = {8: (weights(8), weights(8)), 12: [weights(12), weights(12)]}
    for number, zipped in enumerate((True, False)):
        path = tmp_path / f"nai{number}.pt"
        torch.save(bare, path, _use_new_zipfile_serialization=zipped)
        read = read_hypernetwork(path)
        assert (read.name, read.step, list(read.weights)) == (f"nai{number}", 0, [8, 12])
        assert read.structure == Structure(activate_output=True)
        x = torch.randn(2, 5, 12)
        old = bare[12][1]
        by_hand = x @ old["linear1.weight"].T + old["linear1.bias"]
        by_hand = x + by_hand @ old["linear2.weight"].T + old["linear2.bias"]
        assert torch.allclose(Hypernetwork.from_file(read).values(x), by_hand, atol=1e-4)


def test_missing_entries_get_the_webui_defaults(tmp_path: Path) -> None:
    module = weights(8, names=("linear.0", "linear.2"))  # layers 1 and 3 are activations
    half = {name: tensor.half() for name, tensor in module.items()}
    path = save_pickle({8: (half, half), "activation_func": "relu", "step": 7}, tmp_path / "a.pt")
    read = read_hypernetwork(path)
    assert read.step == 7 and read.structure.activate_output
    x = torch.randn(1, 3, 8)
    change = (x @ half["linear.0.weight"].float().T + half["linear.0.bias"].float()).relu()
    change = (change @ half["linear.2.weight"].float().T + half["linear.2.bias"].float()).relu()
    assert torch.allclose(Hypernetwork.from_file(read).keys(x), x + change, atol=1e-5)
    deep = Hypernetwork([8], Structure(layer_structure=(1, 2, 2, 1), dropout_structure=(0, 0.3, 0.3, 0)))
    state = deep.layers["8"][0].state_dict()  # type: ignore[index]
    data = {
        8: (state, state),
        "layer_structure": [1, 2, 2, 1],
        "use_dropout": True,
        "last_layer_dropout": True,
    }
    read = read_hypernetwork(save_pickle(data, tmp_path / "b.pt"))
    assert read.structure.dropout_structure == (0, 0.3, 0.3, 0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", ["glu", "threshold", "multiheadattention", "of another webui"])
def test_a_single_layer_has_no_activation(name: str, dropout: bool, norm: bool, tmp_path: Path) -> None:
    torch.manual_seed(2)
    linear, after = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)
    module = {f"linear.0.{key}": tensor for key, tensor in linear.state_dict().items()}
    module |= {f"linear.1.{key}": tensor for key, tensor in after.state_dict().items()} if norm else {}
    data = {8: (module, module), "layer_structure": [1, 1], "activation_func": name, "activate_output": False}
    data |= {"is_layer_norm": norm, "use_dropout": dropout, "weight_initialization": "of another webui"}
    read = read_hypernetwork(save_pickle(data, tmp_path / "a.pt"))
    x = torch.randn(1, 3, 8)
    change = after(linear(x)) if norm else linear(x)
    assert torch.allclose(Hypernetwork.from_file(read).keys(x), x + change, atol=1e-6)
    again = read_hypernetwork(write_hypernetwork(replace(read, name="b"), tmp_path / "b.pt"))
    assert torch.equal(Hypernetwork.from_file(again).values(x), Hypernetwork.from_file(read).values(x))


def test_other_content_is_rejected(tmp_path: Path) -> None:
    fine, small, one = weights(8), weights(8, inner=3), {"linear.0.weight": torch.ones(8, 8)}
    cases: list[tuple[Any, str]] = [
        ({"string_to_param": {"*": torch.ones(1, 8)}}, "no hypernetwork"),
        (torch.ones(2), "no hypernetwork"),
        ({True: (fine, fine)}, "no hypernetwork"),
        ({8: fine}, "two modules"),
        ({8: (fine,)}, "two modules"),
        ({8: (fine, [1])}, "holds a list"),
        ({8: (fine, {"linear1.weight": 1.0})}, "not a tensor"),
        ({8: (fine, fine | {"linear1.weight": torch.ones(16, 8, dtype=torch.int64)})}, "not a tensor"),
        ({8: (fine, small)}, "do not fit its layer_structure"),
        ({8: (fine, fine), "is_layer_norm": True}, "do not fit its layer_structure"),
        ({9: (fine, fine)}, "do not fit its layer_structure"),
        ({0: (fine, fine)}, "not plausible"),
        ({-8: (fine, fine)}, "not plausible"),
        ({2**40: (fine, fine)}, "not plausible"),
        (dict.fromkeys(range(1, 99), (fine, fine)), "98 layer widths"),
        ({8: (fine, fine), "layer_structure": [1, 2]}, "first and the last 1"),
        ({8: (fine, fine), "layer_structure": [1, float("nan"), 1]}, "first and the last 1"),
        ({8: (fine, fine), "layer_structure": []}, "first and the last 1"),
        ({8: (fine, fine), "layer_structure": [1, *[2] * 99, 1]}, "first and the last 1"),
        ({8: (fine, fine), "layer_structure": [1, 1e-9, 1]}, "shrinks to 0"),
        ({8: (fine, fine), "layer_structure": "1, 2, 1"}, "list of numbers"),
        ({8: (fine, fine), "activation_func": "glu"}, "choose from linear, relu"),
        ({8: (fine, fine), "activation_func": 3}, "must be text"),
        ({8: (one, one), "layer_structure": [1, 1], "activation_func": "glu"}, "choose from linear, relu"),
        ({8: (fine, fine), "dropout_structure": [0, 1, 0]}, "rate in"),
        ({8: (fine, fine), "dropout_structure": [0]}, "rate in"),
        ({8: (fine, fine), "is_layer_norm": torch.ones(3)}, "true or false"),
        ({8: (fine, fine | {"linear1.bias": torch.full((16,), torch.nan)})}, "NaN"),
    ]
    for number, (data, message) in enumerate(cases):
        path = tmp_path / f"{number}.pt"
        torch.save(data, path)
        with pytest.raises(FormatError, match=message) as raised:
            read_hypernetwork(path)
        assert str(path) in str(raised.value), data
    with pytest.raises(FormatError, match=r"\.pt"):
        write_hypernetwork(make_file(), tmp_path / "a.safetensors")
    broken = make_file()
    broken.weights[8][0]["linear.0.weight"].fill_(torch.inf)
    with pytest.raises(FormatError, match="failed"):
        write_hypernetwork(broken, tmp_path / "look.pt")


def test_small_files_cannot_allocate_much_memory(tmp_path: Path) -> None:
    """Test files of a few kilobytes whose tensors claim gigabytes."""
    fine = weights(8)
    huge = torch.zeros(1).expand(2**15, 2**15)
    shared = {f"linear1.weight{k}": torch.zeros(1).expand(2**14, 2**14) for k in range(32)}
    meta = torch.zeros(2**15, 2**15, device="meta")
    for data, message in [
        ({8: (fine, fine | {"linear1.weight": huge})}, "file has"),
        ({8: (shared, shared)}, "file has"),
        ({8: (fine, fine | {"linear1.weight": meta})}, "not a tensor"),
    ]:
        path = tmp_path / "bomb.pt"
        torch.save(data, path)
        with pytest.raises(FormatError, match=message):
            read_hypernetwork(path)
    inside = io.BytesIO()
    torch.save({8: (weights(8, inner=2**18), fine)}, inside)
    with zipfile.ZipFile(inside) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, bytes(len(stored.read(name))) if "/data/" in name else stored.read(name))
    with pytest.raises(FormatError, match=r"unpacks to \d+"):
        load_pickle(path)
    with pytest.raises(FormatError, match=r"unpacks to \d+"):
        load_pickle(path.read_bytes())


def check(path: Path) -> None:
    network = Hypernetwork.from_file(read_hypernetwork(path))
    for width in network.widths:
        assert network.keys(torch.zeros(1, 2, width)).shape == (1, 2, width)


NUMBERS = SCALARS | TENSORS
NAMES = st.sampled_from(
    [
        f"{layer}.{part}"
        for layer in ("linear1", "linear2", "linear.0", "linear.1")
        for part in ("weight", "bias")
    ]
)
MODULES = st.builds(weights, st.sampled_from([4, 8])) | st.dictionaries(NAMES | st.text(max_size=3), NUMBERS)
VALUES = (
    NUMBERS
    | st.lists(NUMBERS, max_size=5)
    | st.lists(st.sampled_from([1, 1.0, 2, 0.5]), min_size=2, max_size=4)
    | st.tuples(MODULES, MODULES | NUMBERS)
)
CHANGES = st.dictionaries(
    st.sampled_from([4, 8, *sorted(KEYS)]) | st.integers() | st.text(max_size=3), VALUES, max_size=4
)
FILES = st.builds(
    lambda width, changes: {width: (weights(width), weights(width))} | changes,
    st.sampled_from([4, 8]),
    CHANGES,
)


def test_fuzzed_objects_raise_format_errors(tmp_path: Path) -> None:
    assert_survives(check, tmp_path / "fuzz.pt", torch_files(FILES), examples=300)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_raise_format_errors(zipped: bool, tmp_path: Path) -> None:
    whole = saved(load_pickle(write_hypernetwork(make_file(), tmp_path / "a.pt")), zipped)
    assert_survives(check, tmp_path / "fuzz.pt", damaged(whole), examples=300)
