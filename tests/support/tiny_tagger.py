"""Writes a tiny ONNX model in the format of WD taggers, whose tags are the colours of an image."""

from pathlib import Path

import numpy as np

SIDE = 16
# Each tag's probability is the image's mean of one colour channel: name, category, channel of BGR.
TAGS = [
    ("general", 9, 1),
    ("explicit", 9, 2),
    ("blue_sky", 0, 0),
    (">_<", 0, 1),
    ("hero_(show)", 4, 2),
    ("red_hat", 0, 2),
]


def write_tagger(
    folder: Path,
    *,
    batch: int | str | None = "N",
    names: int = len(TAGS),
    ends: tuple[str, str] = ("input", "output"),
    header: str = "tag_id,name,category,count",
) -> Path:
    from onnx import TensorProto, helper, numpy_helper, save

    weights = np.zeros((3, len(TAGS)), dtype=np.float32)
    for number, (_, _, channel) in enumerate(TAGS):
        weights[channel, number] = 1 / 255
    nodes = [
        helper.make_node("ReduceMean", [ends[0]], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], [ends[1]]),
    ]
    given = helper.make_tensor_value_info(ends[0], TensorProto.FLOAT, [batch, SIDE, SIDE, 3])
    made = helper.make_tensor_value_info(ends[1], TensorProto.FLOAT, [batch, len(TAGS)])
    graph = helper.make_graph(nodes, "tagger", [given], [made], [numpy_helper.from_array(weights, "weights")])
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(model, str(folder / "model.onnx"))
    rows = [f"{number},{name},{category},9" for number, (name, category, _) in enumerate(TAGS[:names])]
    columns = header.count(",") + 1
    rows = [",".join(row.split(",")[:columns]) for row in rows]
    (folder / "selected_tags.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder
