"""Old name, for one release: names the new command and runs it."""

import check_environment  # noqa: F401

from sepllm_train.cli.old import main

if __name__ == "__main__":
    raise SystemExit(main(__file__))
