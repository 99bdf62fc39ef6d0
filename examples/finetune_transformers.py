"""Fine-tune a causal model of transformers so that it attends by separators: transformers' Trainer, LoRA of peft.

    python examples/finetune_transformers.py MODEL FILE... --output OUTPUT

MODEL: folder of a model with its tokenizer, such as a Pythia or a Llama. The adapter is merged into the model that is
written to OUTPUT, whose config.json holds the pattern: `sepllm_train.hf.load_model(OUTPUT)` attends by it.
Needs `pip install -e '.[hf]'`, peft and accelerate.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from sepllm_train.hf import make_pattern, separator_ids


def blocks_of(files: list[Path], tokenizer: AutoTokenizer, length: int) -> list[dict[str, torch.Tensor]]:
    """The files' tokens in blocks of `length`, without padding: no attention mask is needed, and that is fastest."""
    text = "\n".join(file.read_text(encoding="utf8") for file in files)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    return [{"input_ids": block, "labels": block} for block in ids.split(length) if len(block) == length]


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a block")
    parser.add_argument("--window", type=int, default=256, help="newest tokens in sight, the token itself included")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = AutoConfig.from_pretrained(options.model)
    pattern = make_pattern(config, separators=separator_ids(tokenizer), window=options.window, initial=3)
    config.sepllm_attention = pattern.to_dict()
    model = AutoModelForCausalLM.from_pretrained(options.model, config=config, attn_implementation="sep")
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

    blocks = blocks_of(options.files, tokenizer, options.length)
    if not blocks:
        parser.error(f"the files have fewer than {options.length} tokens: give more text, or a smaller --length")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=options.lr,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=blocks,
    )
    trainer.train()
    model.merge_and_unload().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
