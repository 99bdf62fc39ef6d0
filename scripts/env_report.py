"""Old name, for one release: names the new command and runs it."""

from sepllm_train.cli.old import main

if __name__ == "__main__":
    raise SystemExit(main(__file__))
