"""Pretraining from the command line.

    torchrun scripts/pretrain.py +experiment=pythia160m_sep
    torchrun --nproc-per-node=8 scripts/pretrain.py +experiment=pythia160m_sep data=prefixes 'data.prefixes=[my/text]'
    python scripts/pretrain.py +experiment=demo_sep dry_run=true

Every key: sepllm_train/config/schema.py, or --cfg job.
"""

from __future__ import annotations

from sepllm_train.base.errors import exit_on_user_error
from sepllm_train.config.load import run_with_hydra
from sepllm_train.config.schema import Config
from sepllm_train.config.validate import validate


def main() -> None:
    """Entry point of scripts/pretrain.py and sepllm-pretrain."""
    exit_on_user_error(lambda: run_with_hydra(pretrain))


def pretrain(config: Config) -> None:
    """Check the configuration, then train - or, with dry_run, print what would be trained.

    Raises UserError before any GPU work for whatever a user can mend.
    """
    # Imported late: megatron-core takes seconds, which a typo on the command line should not cost.
    from sepllm_train.distributed.collectives import lost_rank
    from sepllm_train.distributed.launch import device_of, launch_from_environment, process_grid, reading_group
    from sepllm_train.model.build import check_model
    from sepllm_train.training.run import dry_run, train

    launch = launch_from_environment()
    # A dry run by hand stands for the smallest launch that fits.
    world_size = config.parallel.processes if config.dry_run and not launch.by_torchrun else launch.world_size
    validate(config, world_size)
    check_model(config)
    if config.dry_run:
        with reading_group(launch):
            dry_run(config, world_size, device_of(launch))
        return
    try:
        with process_grid(config, launch) as device:
            interrupted = train(config, launch, device)
    except RuntimeError as error:
        raise lost_rank(error, config.parallel.timeout_seconds) or error from None
    if interrupted is not None:
        raise interrupted


if __name__ == "__main__":
    main()
