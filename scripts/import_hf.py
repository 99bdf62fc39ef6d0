"""Makes a checkpoint of a Hugging Face model: GPT-NeoX (Pythia), Llama, Mistral or Qwen3 in safetensors.

python scripts/import_hf.py models/pythia-160m imported/pythia-160m
python scripts/import_hf.py models/pythia-160m imported/sep --attention pattern=sep window=64 --data data/books

OUTPUT opens like the folder of a run: weights as its checkpoint of step 0, for any layout. It appears when its logits
were found equal to those of the model.
"""

from __future__ import annotations

import check_environment  # noqa: F401

import argparse
from pathlib import Path

from sepllm_train.base.errors import UserError, exit_on_user_error, first_line


def main() -> None:
    """Import the model that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a transformers model")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
    parser.add_argument(
        "--attention",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="attention from now on, such as pattern=sep (default: as it was exported; full for any other model)",
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="PREFIX", help="datasets made with its tokenizer")
    parser.add_argument("--overwrite", action="store_true", help="replace an imported model in OUTPUT")
    arguments = parser.parse_args()
    try:
        from sepllm_train.hf.importing import import_model
    except ImportError as error:
        raise UserError(
            f"transformers is missing ({first_line(error)}): pip install -e '.[hf]' in the checkout."
        ) from None
    import_model(
        arguments.model,
        arguments.output,
        attention=arguments.attention,
        data=arguments.data,
        overwrite=arguments.overwrite,
    )


if __name__ == "__main__":
    exit_on_user_error(main)
