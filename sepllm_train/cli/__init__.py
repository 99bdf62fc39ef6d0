"""The program `sepllm`: one module per command, shared options in flags.py, dispatch and exit codes in main.py."""
