"""sepllm export: a run as a model of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sepllm_train.cli import flags


def main(words: Sequence[str]) -> None:
    """Export a run. Raises UserError."""
    parser = flags.parser(
        "export",
        "Write a run as a model of Hugging Face transformers: GPT-NeoX, Llama or Qwen3 in safetensors, with\n"
        "its tokenizer. OUTPUT appears when the logits of what was written were found equal to those of the run, with\n"
        "full attention and with the run's pattern.",
        "runs/books_sep exported/books_sep\nruns/books_sep exported/books_sep_early --checkpoint 1000 --dtype bf16",
    )
    flags.add_run(parser)
    add = parser.add_argument
    add("output", type=Path, metavar="OUTPUT", help="folder to write")
    add("--dtype", choices=flags.DTYPES, help="type of the weights (default: the run's)")
    add("--tokenizer", type=Path, metavar="FILE", help="the run's tokenizer, where its data is gone")
    add("--overwrite", action="store_true", help="replace an exported model in OUTPUT")
    arguments = parser.parse_args(words)
    flags.require_run(arguments.run_folder, arguments.checkpoint)
    flags.require_new(arguments.output, overwrite=arguments.overwrite)
    flags.require_tokenizer(arguments.tokenizer)

    from sepllm_train.hf.export import export_run
    from sepllm_train.runs.open import open_run

    run = open_run(arguments.run_folder, arguments.checkpoint, tokenizer=arguments.tokenizer)
    export_run(run, arguments.output, dtype=arguments.dtype, overwrite=arguments.overwrite)
