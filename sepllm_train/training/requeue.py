"""Decide for a batch job whose run was interrupted: back into the queue only while the run makes progress.

    python -m sepllm_train.training.requeue JOB +experiment=pythia160m_sep name=first

prints its answer and ends with 0 for yes and 1 for no. RUN/requeue.json holds the job and the step it was
last requeued at.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sepllm_train.base.errors import exit_on_user_error
from sepllm_train.base.files import write_json
from sepllm_train.base.parsing import read_json
from sepllm_train.base.shapes import Range, require_shape
from sepllm_train.config.load import configuration_of


def decide(folder: Path, job: str) -> tuple[bool, str]:
    """(requeue?, reason) for the run in `folder`, interrupted in `job`; a yes is recorded there.

    The answer is no when the newest whole checkpoint is still that of the job's previous requeue: the time limit is
    then too short for a start and one step, and the job would be requeued without end. Raises UserError for a record
    that cannot be read.
    """
    # Imported late: it takes seconds, which a typo on the command line should not cost.
    from sepllm_train.training import checkpoint

    found = checkpoint.newest(folder)
    step = -1 if found is None else int(checkpoint.read_state(found)["state"]["step"])
    saved = "no checkpoint" if found is None else f"step {step}"
    record, remedy = folder / "requeue.json", "delete it"
    earlier = read_json(record, remedy) if record.exists() else None
    if earlier is not None:
        require_shape(earlier, {"job": str, "step": Range(-1)}, record, remedy)
    if earlier is not None and earlier["job"] == job and step <= earlier["step"]:
        return False, (
            f"not requeued: {folder} has {saved}, as when job {job} was requeued before; give the job a longer time "
            "limit, or an earlier --signal."
        )
    if not folder.is_dir():
        return False, f"not requeued: the run did not get as far as making {folder}."
    write_json(record, {"job": job, "step": step})
    return True, f"requeued: {folder} has {saved} and continues from there."


def main() -> None:
    """Entry point: the first word is the job, the others are the run's overrides."""
    job, *overrides = sys.argv[1:]
    answers: list[bool] = []

    def answer() -> None:
        config = configuration_of(overrides)
        yes, reason = decide(Path(config.run_root) / config.name, job)
        print(reason, flush=True)
        answers.append(yes)

    exit_on_user_error(answer)
    sys.exit(0 if answers[0] else 1)


if __name__ == "__main__":
    main()
