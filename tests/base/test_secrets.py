"""Secrets are masked by the names that stand for them, by their place in URLs and by their form."""

from __future__ import annotations

import pytest

from sepllm_train.base.secrets import masked, masked_values, masked_words, names_a_secret


@pytest.mark.parametrize(
    "variable",
    [
        "NVIDIA_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "TORCH_PASS", "CUDA_PASSWORD", "NCCL_CREDENTIALS",
        "SEPLLM_AUTH", "TORCH_AUTHORIZATION", "sepllm_token", "NVIDIA_PWD", "TORCH_PRIVATE", "HYDRA_COOKIE",
    ],
)  # fmt: skip
def test_variables_that_may_hold_one(variable: str) -> None:
    assert names_a_secret(variable)


@pytest.mark.parametrize("variable", ["NCCL_DEBUG", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_LIBRARY_PATH"])
def test_variables_that_hold_none(variable: str) -> None:
    assert not names_a_secret(variable)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hunter2@host/x", "https://me:***@host/x"),
        ("s3://hunter2@bucket", "s3://***@bucket"),
        ("redis://:hunter2@host:1", "redis://:***@host:1"),
        ("https://host/x?api_key=hunter2&b=1", "https://host/x?api_key=***&b=1"),
        ("[a,token=hunter2,b]", "[a,token=***,b]"),
        ("password: hunter2", "password: ***"),
        ('{"client_secret": "hunter2"}', '{"client_secret": "***"}'),
        ("Authorization: Bearer hunter2hunter2", "Authorization: *** ***"),
        ("hf_hunter2hunter2hunter2", "***"),
        ("sk-hunter2hunter2hunter2", "***"),
        ("AKIAHUNTER2HUNTER234", "***"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    assert masked(text) == shown and masked(masked(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "attention.initial_tokens=3", "data.tokenizer=x.json", "attention.keep_share=0.5", "tokens: 500",
        "https://host:8080/a@b", "git@host:a/b", "data/2024_01", "--tokens", "'data.prefixes=[data/books]'",
        "a3f5" * 16, "'attention.separators=[period,question]'",
    ],
)  # fmt: skip
def test_other_texts_stay(text: str) -> None:
    assert masked(text) == text and masked_words([text]) == [text]


def test_words_of_a_command_line() -> None:
    words = [
        "sepllm",
        "pretrain",
        "hydra.job.env_set.WANDB_API_KEY=hunter2",
        "--hf-token",
        "hunter2",
        "--tokens",
        "200",
    ]
    assert masked_words([*words, "+x.password='hunter2 b'", "name=a"]) == [
        "sepllm", "pretrain", "hydra.job.env_set.WANDB_API_KEY=***", "--hf-token", "***", "--tokens", "200",
        "+x.password=***", "name=a",
    ]  # fmt: skip


def test_nested_values() -> None:
    content = {"api_key": "hunter2", "tokenizer": "t", "tokens": 5, "a": [{"b": "ftp://me:hunter2@host"}], "key": None}
    assert masked_values(content) == {
        "api_key": "***", "tokenizer": "t", "tokens": 5, "a": [{"b": "ftp://me:***@host"}], "key": None,
    }  # fmt: skip
