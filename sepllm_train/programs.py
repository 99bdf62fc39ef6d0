"""The installed programs: each looks at the environment before it imports what that may lack."""

from __future__ import annotations

import sys

from sepllm_train.requirements import end_if_unsound


def pretrain() -> None:
    """sepllm-pretrain."""
    end_if_unsound()
    from sepllm_train.pretrain import main

    main()


def prepare_data() -> None:
    """sepllm-prepare-data."""
    end_if_unsound()
    from data_prep.cli import main

    sys.exit(main())


def compare_runs() -> None:
    """sepllm-compare-runs."""
    end_if_unsound()
    from sepllm_train.compare_runs import main

    sys.exit(main())
