"""sepllm import: a checkpoint from a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sepllm_train.base.errors import UserError
from sepllm_train.cli import flags
from sepllm_train.config.present import require_dataset


def main(words: Sequence[str]) -> None:
    """Import a model. Raises UserError."""
    parser = flags.parser(
        "import",
        "Make a checkpoint of a Hugging Face model: GPT-NeoX (Pythia), Llama, Mistral or Qwen3 in safetensors. OUTPUT\n"
        "opens like the folder of a run: weights as its checkpoint of step 0, for any layout. It appears when its\n"
        "logits were found equal to those of the model.",
        "models/pythia-160m imported/pythia-160m\n"
        "models/pythia-160m imported/sep --attention pattern=sep window=64 --data data/books",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder of a transformers model")
    add("output", type=Path, metavar="OUTPUT", help="folder to write")
    add(
        "--attention",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="attention from now on, such as pattern=sep (default: as it was exported; full for any other model)",
    )
    add("--data", nargs="+", default=[], metavar="PREFIX", help="datasets made with its tokenizer")
    add("--overwrite", action="store_true", help="replace an imported model in OUTPUT")
    arguments = parser.parse_args(words)
    path = arguments.model / "config.json"
    if not path.is_file():
        raise UserError(f"{path} cannot be read (No such file or directory): give the folder of a transformers model.")
    flags.require_new(arguments.output, overwrite=arguments.overwrite)
    for prefix in arguments.data:
        require_dataset(prefix)

    from sepllm_train.hf.importing import import_model

    import_model(
        arguments.model,
        arguments.output,
        attention=arguments.attention,
        data=arguments.data,
        overwrite=arguments.overwrite,
    )
