"""Writes the schemas of this folder from the CustomResourceDefinitions of KubeRay and Kueue.

python make_crds.py ray.io_rayjobs.yaml kueue.x-k8s.io_clusterqueues.yaml ...: for each, KIND.json with the schema of
its storage version, without descriptions; equal parts, such as the pod templates, are written once, in $defs.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

SHORT = 150  # characters; shorter parts are not shared


def without_descriptions(node: Any, *, names: bool = False) -> Any:
    """Return a schema without descriptions; ``names``: the keys of ``node`` are names of properties."""
    if isinstance(node, dict):
        return {
            key: without_descriptions(value, names=key == "properties" and not names)
            for key, value in node.items()
            if names or key not in ("description", "format")
        }
    return [without_descriptions(value) for value in node] if isinstance(node, list) else node


def share(schema: dict[str, Any]) -> dict[str, Any]:
    """Return an equal schema whose repeated parts are in $defs."""
    counts: Counter[str] = Counter()
    names: dict[str, str] = {}
    parts: dict[str, Any] = {}

    def count(node: Any) -> None:
        if isinstance(node, dict) and "type" in node:
            counts[json.dumps(node, sort_keys=True)] += 1
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            count(value)

    def replace(node: Any, *, whole: bool = False) -> Any:
        if isinstance(node, list):
            return [replace(value) for value in node]
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        if not whole and "type" in node and len(text) > SHORT and counts[text] > 1:
            if text not in names:
                names[text] = f"part{len(names)}"
                parts[names[text]] = replace(node, whole=True)
            return {"$ref": f"#/$defs/{names[text]}"}
        return {key: replace(value) for key, value in node.items()}

    count(schema)
    found = replace(schema, whole=True)
    return {**found, "$defs": parts} if parts else found


def main(files: list[str]) -> None:
    """Write the schema of each file."""
    for file in files:
        crd = yaml.safe_load(Path(file).read_text())["spec"]
        (stored,) = [version for version in crd["versions"] if version["storage"]]
        schema = share(without_descriptions(stored["schema"]["openAPIV3Schema"]))
        found = {"apiVersion": f"{crd['group']}/{stored['name']}", "schema": schema}
        path = Path(__file__).with_name(f"{crd['names']['kind']}.json")
        path.write_text(json.dumps(found, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
