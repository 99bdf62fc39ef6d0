"""`python -m sepllm_train COMMAND`: the program `sepllm`."""

import sys

from sepllm_train.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
