"""Writes the Grafana dashboard of training runs from a short table of its panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dreamfleet.datasets.json_text import json_text

DATASOURCE = {"type": "prometheus", "uid": "dreamfleet-prometheus"}
FILE = Path(__file__).with_name("grafana") / "dashboards" / "dreamfleet.json"
RUN = 'run=~"$run"'
FIRST = f'{{{RUN}, rank="0"}}'
EACH = f"{{{RUN}}}"
WIDTH, HEIGHT = 8, 7  # of a panel; a row has 24 columns


class Panel(NamedTuple):
    """A panel: its title, its queries by legend, unit, and when it has no data."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    empty: str = ""  # the reason why it may have no data
    stacked: bool = False


PANELS = [
    Panel(
        "Progress",
        {"{{run}}": f"ray_dreamfleet_step{FIRST} / ray_dreamfleet_total_steps{FIRST}"},
        "percentunit",
        "bargauge",
    ),
    Panel(
        "Effective training time",
        {"{{run}}": f"ray_dreamfleet_effective_training_time{FIRST}"},
        "percentunit",
        "stat",
    ),
    Panel("Steps", {"{{run}}": f"ray_dreamfleet_step{FIRST}"}),
    Panel("Training loss", {"{{run}}": f"ray_dreamfleet_loss{FIRST}"}),
    Panel(
        "Validation",
        {"{{run}} {{name}}": f"ray_dreamfleet_figure{FIRST}"},
        empty="a run without validation measures nothing",
    ),
    Panel("Gradient norm", {"{{run}}": f"ray_dreamfleet_gradient_norm{FIRST}"}),
    Panel("Images per second", {"{{run}}": f"ray_dreamfleet_images_per_second{FIRST}"}),
    Panel(
        "Parts of a step, mean of the workers",
        {
            "{{run}} data": f"avg by (run) (ray_dreamfleet_data_wait_seconds{EACH})",
            "{{run}} passes": f"avg by (run) (ray_dreamfleet_forward_backward_seconds{EACH})",
            "{{run}} optimizer": f"avg by (run) (ray_dreamfleet_optimizer_seconds{EACH})",
        },
        "s",
        stacked=True,
    ),
    Panel(
        "Step time of each worker",
        {"{{run}} rank {{rank}} {{node}}": f"ray_dreamfleet_step_seconds{EACH}"},
        "s",
    ),
    Panel(
        "Save, mean seconds",
        {
            "{{run}} {{where}}": f"sum by (run, where) (ray_dreamfleet_save_seconds_sum{EACH})"
            f" / sum by (run, where) (ray_dreamfleet_save_seconds_count{EACH})"
        },
        "s",
    ),
    Panel(
        "Checkpoints that are being uploaded",
        {"{{run}}": f"ray_dreamfleet_uploads_waiting{FIRST}"},
    ),
    Panel(
        "Failures by cause",
        {"{{run}} {{cause}}": f"sum by (run, cause) (ray_dreamfleet_failures_total{EACH})"},
        empty="a run without failures has none",
    ),
    Panel("Starts of the workers", {"{{run}}": f"sum by (run) (ray_dreamfleet_starts_total{EACH})"}),
    Panel(
        "Regroups by cause",
        {"{{run}} {{cause}}": f"sum by (run, cause) (ray_dreamfleet_regroups_total{EACH})"},
        empty="a run that loses and gains no workers has none",
    ),
    Panel(
        "Peak memory of each worker",
        {"{{run}} rank {{rank}} {{node}}": f"ray_dreamfleet_peak_memory_bytes{EACH}"},
        "bytes",
    ),
    Panel(
        "GPU utilisation",
        {"{{instance}} GPU {{GpuIndex}}": "ray_node_gpus_utilization / 100"},
        "percentunit",
        empty="machines without a GPU have none",
    ),
    Panel(
        "GPU memory of each machine, in MiB",
        {"{{instance}} GPU {{GpuIndex}}": "ray_node_gram_used"},
        empty="machines without a GPU have none",
    ),
    Panel("CPU of each machine", {"{{instance}}": "ray_node_cpu_utilization / 100"}, "percentunit"),
    Panel("Memory of each machine", {"{{instance}}": "ray_node_mem_used"}, "bytes"),
    Panel("Sent by each machine", {"{{instance}}": "ray_node_network_send_speed"}, "Bps"),
]


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana's JSON."""
    return {
        "uid": "dreamfleet-runs",
        "title": "dreamfleet",
        "tags": ["dreamfleet", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_run_variable()]},
        "annotations": {"list": []},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _run_variable() -> dict[str, Any]:
    query = "label_values(ray_dreamfleet_step, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "runs"},
        "definition": query,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend, "datasource": DATASOURCE}
        for place, (legend, query) in enumerate(panel.queries.items())
    ]
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 30} if panel.stacked else {"fillOpacity": 5}
    limits = {"min": 0, "max": 1} if panel.unit == "percentunit" else {}
    options: dict[str, Any] = {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi"},
    }
    if panel.kind != "timeseries":
        custom, options = {}, {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal"}
    return {
        "id": number + 1,
        "title": panel.title,
        "description": f"No data: {panel.empty}." if panel.empty else "",
        "type": panel.kind,
        "datasource": DATASOURCE,
        "gridPos": {"x": number % 3 * WIDTH, "y": number // 3 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom, **limits}, "overrides": []},
        "options": options,
    }


if __name__ == "__main__":
    FILE.write_text(json_text(dashboard(), indent=2) + "\n", encoding="utf-8")
