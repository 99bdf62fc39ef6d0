"""Secrets in names and texts: what is recorded, printed or sent away goes through `masked` first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

MASK = "***"
# Words in the names of variables that may hold a secret: such a variable is no part of a report.
_NAMES = (
    "KEY", "TOKEN", "SECRET", "PASS", "PWD", "CREDENTIAL", "AUTH", "PRIVATE", "COOKIE", "SIGNATURE", "BEARER", "CERT",
    "SESSION", "LOGIN",
)  # fmt: skip
# The same as whole words, or at the end of a word, of keys and options: `initial_tokens` and `tokenizer` are none.
_WORD = (
    r"(?:\w*(?:key|token|secret|password|passwd|passphrase|credentials?|cookie)|pass|pwd|auth|authorization|bearer|"
    r"private|signature|sig)"
)
_SECRET_WORD = re.compile(_WORD, re.IGNORECASE)
_PATTERNS = (
    # scheme://user:password@host and scheme://token@host.
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://(?:[^/\s:@'\"]*:)?)[^/\s@'\"]+@", re.IGNORECASE), rf"\1{MASK}@"),
    (re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{MASK}"),
    # token=..., "api_key": "...", --password=..., also in the query of a URL.
    (re.compile(rf"(\b{_WORD}['\"]?\s*[=:]\s*['\"]?)[^\s'\"&,;\]}})]+", re.IGNORECASE), rf"\1{MASK}"),
    # Tokens that are known by their form.
    (
        re.compile(
            r"\b(?:hf_|gh[oprsu]_|github_pat_|glpat-|sk-|nvapi-|wandb_v\d_|pypi-|npm_|xox[abprs]-)[\w-]{12,}"
            r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
        ),
        MASK,
    ),
    (re.compile(r"-----BEGIN [^-]*PRIVATE KEY-----.*", re.DOTALL), MASK),
)


def names_a_secret(variable: str) -> bool:
    """True for the name of a variable of the environment that may hold a secret."""
    return any(word in variable.upper() for word in _NAMES)


def masked(text: str) -> str:
    """`text` without the passwords in URLs, the values of names that stand for secrets, and tokens of known form."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def masked_words(words: Sequence[str]) -> list[str]:
    """The words of a command line, without what KEY=VALUE or --option VALUE give to a key that stands for a secret."""
    found: list[str] = []
    for place, word in enumerate(words):
        key, equals, _ = word.partition("=")
        before = words[place - 1] if place else ""
        if equals and _is_secret(key):
            found.append(f"{key}={MASK}")
        elif before.startswith("--") and "=" not in before and _is_secret(before) and not word.startswith("-"):
            found.append(MASK)
        else:
            found.append(masked(word))
    return found


def masked_values(content: Any) -> Any:
    """Nested mappings and lists with every text in them as `masked`."""
    if isinstance(content, dict):
        return {
            key: MASK if isinstance(value, str) and value and isinstance(key, str) and _is_secret(key)
            else masked_values(value)
            for key, value in content.items()
        }  # fmt: skip
    if isinstance(content, list | tuple):
        return [masked_values(value) for value in content]
    return masked(content) if isinstance(content, str) else content


def _is_secret(key: str) -> bool:
    """True for a key or option whose last part stands for a secret: hydra.job.env_set.WANDB_API_KEY, --hf-token."""
    last = key.rpartition(".")[2]
    return any(_SECRET_WORD.fullmatch(part) for part in re.split(r"[^A-Za-z0-9]+", last) if part)
