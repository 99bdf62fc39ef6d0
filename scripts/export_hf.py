"""Writes a run as a model of Hugging Face transformers: GPT-NeoX, Llama or Qwen3 in safetensors, with its tokenizer.

python scripts/export_hf.py runs/books_sep exported/books_sep
python scripts/export_hf.py runs/books_sep exported/books_sep_early --checkpoint 1000 --dtype bf16

OUTPUT appears when the logits of what was written were found equal to those of the run, with full attention and with
the run's pattern.
"""

from __future__ import annotations

import check_environment  # noqa: F401

import argparse
from pathlib import Path

from sepllm_train.base.errors import UserError, exit_on_user_error, first_line


def main() -> None:
    """Export the run that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="type of the weights (default: the run's)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the run's tokenizer, where its data is gone")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported model in OUTPUT")
    arguments = parser.parse_args()
    try:
        from sepllm_train.hf.export import export_run
    except ImportError as error:
        raise UserError(
            f"transformers is missing ({first_line(error)}): pip install -e '.[hf]' in the checkout."
        ) from None
    from sepllm_train.runs.open import open_run

    run = open_run(arguments.run_folder, arguments.checkpoint, tokenizer=arguments.tokenizer)
    export_run(run, arguments.output, dtype=arguments.dtype, overwrite=arguments.overwrite)


if __name__ == "__main__":
    exit_on_user_error(main)
