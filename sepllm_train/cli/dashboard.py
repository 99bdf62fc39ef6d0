"""sepllm dashboard: a W&B workspace for runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.cli import flags


def main(words: Sequence[str]) -> None:
    """Make a workspace. Raises UserError."""
    parser = flags.parser(
        "dashboard",
        "Make a W&B workspace that compares runs: losses over FLOPs, time and tokens, speed, attention, each layer.",
        '--entity ME --group first --dry-run first.json\n--entity ME --group dense sep --name "dense against sep"',
    )
    add = parser.add_argument
    add("--entity", required=True, help="user or team")
    add("--project", default="sepllm-train", help="default: %(default)s")
    add(
        "--group",
        nargs="+",
        default=[],
        help="logging.group of the runs; of one group every run is drawn, of several (default: all) each group's mean",
    )
    add("--name", help="title of the workspace; default: made from the groups")
    add("--dry-run", type=Path, metavar="FILE.json", help="write the workspace here; needs no account")
    arguments = parser.parse_args(words)

    from sepllm_train.watch import workspace

    name = arguments.name or " and ".join(arguments.group) or "sepllm-train"
    try:
        built = workspace.build_workspace(arguments.entity, arguments.project, arguments.group, name)
    except ValueError as error:
        raise UserError(f"W&B takes no such workspace: {first_line(error)}.") from None
    if arguments.dry_run is not None:
        workspace.write(arguments.dry_run, workspace.view_of(built))
    else:
        workspace.save(built)
