"""The workspace of a project on W&B, as code: panels, their axes and runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import write_json
from sepllm_train.metrics.flops import CONVENTIONS
from sepllm_train.metrics.wandb_tracker import AXES, has_key, host

_UNITS = {"seconds": "seconds in steps", "tokens": "tokens", "step": "step"}
_UNITS |= {f"flops/{name}": f"flops/{name}: {convention.label}" for name, convention in CONVENTIONS.items()}
# Section -> its panels: (title, keys). All are over steps.
PANELS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "Speed": (
        ("tokens per second", ("train/tokens_per_second",)),
        ("MFU, by flops/model", ("train/mfu",)),
        ("seconds per step", ("train/step_seconds",)),
        ("peak memory, bytes", ("train/memory_bytes",)),
    ),
    "Step breakdown": (
        (
            "seconds per step of each part",
            # The parts of training.clock, which imports torch.
            tuple(f"train/{part}_seconds" for part in ("data_wait", "plan", "forward", "backward", "optimizer")),
        ),
        ("slowest rank over the mean", ("train/straggler_ratio",)),
        ("bytes sent to context-parallel ranks per step", ("train/context_bytes",)),
        ("checkpoints: seconds that steps waited", ("checkpoint/stall_seconds",)),
    ),
    "Optimization": (
        ("gradient norm", ("train/grad_norm",)),
        ("learning rate", ("train/lr",)),
        ("steps skipped", ("train/bad_steps", "train/skipped_steps")),
    ),
}
# Panels of all keys that a pattern matches: each layer, each dataset.
LAYERS = r"train/layer_\d+/attended_share"
DATASETS = r"val/.+/loss"
SCORES = r"eval/[^/]+/(acc|acc_norm|exact_match/[a-z-]+)$"
PERPLEXITIES = r"eval/[^/]+/[a-z_]*perplexity$"


def build_workspace(entity: str, project: str, groups: Sequence[str], name: str) -> Any:
    """A wandb_workspaces Workspace of the runs of `groups` (none: of the whole project).

    Runs are drawn group by group, as mean and range - but each on its own when one group alone is asked for.
    """
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    group = expr.Metric("Group")
    runs = ws.RunsetSettings(
        filters=expr.And(group.isin(list(groups))) if groups else "", groupby=[] if len(groups) == 1 else [group]
    )
    settings = ws.WorkspaceSettings(x_axis="step", max_runs=20)
    return ws.Workspace(
        entity=entity, project=project, name=name, sections=_sections(), settings=settings, runset_settings=runs
    )


def _sections() -> list[Any]:
    """Losses over every axis first, then the rest over steps."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def losses(key: str, words: str) -> list[Any]:
        return [wr.LinePlot(title=f"{words} over {axis}", x=axis, y=[key], title_x=_UNITS[axis]) for axis in AXES]

    def over_steps(title: str, keys: Sequence[str]) -> Any:
        return wr.LinePlot(title=title, x="step", y=list(keys))

    def matching(title: str, pattern: str, axis: str) -> Any:
        return wr.LinePlot(title=title, x=axis, metric_regex=pattern, title_x=_UNITS[axis])

    per_dataset = matching("validation loss of each dataset", DATASETS, AXES[0])
    bits = wr.LinePlot(
        title=f"bits per byte over {AXES[0]}", x=AXES[0], y=["val/bits_per_byte"], title_x=_UNITS[AXES[0]]
    )
    attention = [
        over_steps("attended share of the causal triangle", ["train/attended_share"]),
        matching("attended share of each layer", LAYERS, "step"),
    ]
    panels = {
        "Validation loss": [*losses("val/loss", "validation loss"), bits, per_dataset],
        "Training loss": losses("train/loss", "training loss"),
        "Scores": [
            matching("scores of tasks", SCORES, AXES[0]),
            matching("perplexities of tasks", PERPLEXITIES, AXES[0]),
        ],
        "Attention": attention,
        **{section: [over_steps(*panel) for panel in rows] for section, rows in PANELS.items()},
    }
    return [ws.Section(name=section, panels=rows, is_open=True) for section, rows in panels.items()]


def view_of(workspace: Any) -> dict[str, Any]:
    """Return the request that saving `workspace` sends to W&B: entity, project, name and the spec of the view."""
    view = workspace._to_model()
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"entity": view.entity, "project": view.project, "displayName": view.display_name, "spec": spec}


def write(path: Path, view: dict[str, Any]) -> None:
    """Write the `view` as JSON and print the number of its panels. Raises UserError."""
    write_json(path, view, indent=2)
    panels = sum(len(section["panels"]) for section in view["spec"]["section"]["panelBankConfig"]["sections"])
    print(f"{path}: {panels} panels, nothing was sent")


def save(workspace: Any) -> None:
    """Send the workspace to W&B and print its address. Raises UserError."""
    if not has_key():
        raise UserError(
            f"there is no API key for {host()}: run `wandb login` or set WANDB_API_KEY; --dry-run FILE.json needs none."
        )
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        workspace.save()
    except Exception as error:
        raise UserError(f"{host()} did not take the workspace: {first_line(error)}.") from None
    print(workspace.url)
