"""Share of the keys that a separator pattern keeps at the last token of a prompt, counted without a model.

python scripts/kv_share.py --task gsm8k_cot --data-dir data/eval --tokenizer 20B_tokenizer.json --window 256 --initial 3
"""

import check_environment  # noqa: F401

from sepllm_train.evaluation.kv_share import main

if __name__ == "__main__":
    main()
