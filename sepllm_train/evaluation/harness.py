"""lm-evaluation-harness's interface to transformers, with our attentions and counts in it."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from sepllm_train.base.errors import RankError, UserError
from sepllm_train.evaluation.attention import Attention
from sepllm_train.evaluation.shares import Scored, Shares
from sepllm_train.hf.hooks import cache_argument

_Requests = list[tuple[tuple[str, str] | None, list[int], list[int]]]


class SeparatorLM(HFLM):
    """A model of transformers that attends as `attend` was told last; `shares` counts what it saw since.

    Log-likelihoods are of one forward of each batch, with the pattern or a cache in it; padding on the right is behind
    all real tokens. Under torchrun each rank takes a part of the documents. truncate: cut prompts that do not fit the
    model's context on the left, in place of a UserError. progress: called for each text and each forward.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        truncate: bool = False,
        quiet: bool = True,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )
        self.truncate = truncate
        self.quiet = quiet
        self.progress = progress
        self.truncated = 0
        self.shares = Shares()
        self.attention: Attention | None = None
        # One for all forwards, reset before each: to make one takes a probe of the model's rotary embedding.
        self._cache: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Nothing is computed with a model that has no memory.
            if self.device.type != "meta":
                from accelerate import Accelerator

                self.accelerator = Accelerator(cpu=self.device.type == "cpu")
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def attend(self, attention: Attention) -> None:
        """Attend so from now on, and count anew."""
        attention.install(self.model)
        self.attention = attention
        self.shares, self.truncated = Shares(), 0
        cached = attention.policies is not None and attention.generation_cache is not None
        self._cache = attention.generation_cache() if cached and attention.generation_cache else None

    def check(self, task: str, requests: Iterable[Instance]) -> None:
        """Raise a UserError, or a RankError under torchrun, for a request of `task` that does not fit the model's
        context. The windows of whole texts always do."""
        for request in requests:
            if request.request_type == "loglikelihood":
                self._check_choice(request)
                # The last token is never given to the model.
                self._fits(len(self.tok_encode("".join(request.args))) - 1, f"of {task} ")
            elif request.request_type == "generate_until":
                self._fits(self._with_answer(request), f"of {task} with its answer ")

    def gathered(self) -> tuple[Shares, int]:
        """The counts and the number of truncated prompts of all ranks together; on rank 0. Every rank calls it."""
        found: dict[bytes, Any] = {}
        truncated = 0
        for counts, cut in self.gather_object((self.shares.found, self.truncated)) or []:
            found.update(counts)
            truncated += cut
        return Shares(found), truncated

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each (context, continuation).

        Raises UserError for a continuation that has no tokens of its own.
        """
        for request in requests:
            self._check_choice(request)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.quiet)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in windows of the model's context."""
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self.quiet)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuation of each prompt up to its stop strings."""
        for request in requests:
            self._fits(self._with_answer(request), "with its answer ")
        return super().generate_until(requests, disable_tqdm=disable_tqdm or self.quiet)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text. HFLM leaves out the first token where a text begins with its name, which is text here."""
        self.progress()
        return super().tok_encode(string, add_special_tokens is None or add_special_tokens, **kwargs)

    def _loglikelihood_tokens(
        self, requests: _Requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        sequences = []
        for strings, context, continuation in requests:
            self._fits(len(context) + len(continuation) - 1, "")
            # As HFLM cuts it.
            ids = (context + continuation)[-(self.max_length + 1) :][:-1]
            first = len(ids) - len(continuation)
            # A window of a longer text has no prompt: its last token stands for it.
            sequences.append(Scored(ids, first if strings is not None else len(ids) - 1, max(0, first)))
        assert self.attention is not None
        self.shares.note(self.attention, sequences)
        # Windows come a batch at a time, each with a bar of its own.
        quiet = disable_tqdm or self.quiet or (bool(requests) and requests[0][0] is None)
        return super()._loglikelihood_tokens(requests, quiet, override_bs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.progress()
        with torch.inference_mode():
            if self._cache is None:
                return self.model(inps, use_cache=False).logits
            self._cache.reset()
            return self.model(inps, **{cache_argument(self.model): self._cache}).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        self.progress()
        assert self.attention is not None
        if self.attention.generation_cache is not None:
            kwargs[cache_argument(self.model)] = self.attention.generation_cache()
        made = super()._model_generate(context, max_length, stop, **kwargs)
        sequences = []
        for row, valid, prompt in zip(made.tolist(), kwargs["attention_mask"].tolist(), context.tolist(), strict=True):
            own = prompt[len(valid) - sum(valid) :]
            answer = row[len(prompt) :]
            # The last token is never given to the model.
            ids = own + answer[: max(0, self._until(answer, stop) - 1)]
            sequences.append(Scored(ids, len(own) - 1, len(own) - 1))
        self.shares.note(self.attention, sequences)
        return made

    def _until(self, answer: list[int], stop: list[str]) -> int:
        """Tokens of an answer up to the one that completes a stop string; rows that are done wait for the others."""

        def stopped(tokens: int) -> bool:
            text = self.tok_decode(answer[:tokens], skip_special_tokens=False)
            return any(string in text for string in stop)

        return min(len(answer), bisect_left(range(len(answer) + 1), True, key=stopped))

    def _with_answer(self, request: Instance) -> int:
        """Tokens of a prompt and the longest answer that it may have. Raises UserError where that alone is too long."""
        prompt, how = request.args
        answer = how.get("max_gen_toks", self.max_gen_toks)
        if answer >= self.max_length:
            raise self._refused(
                f"answers of {request.task_name} may have {answer:,} tokens, which leaves no room for a prompt in the "
                f"model's context of {self.max_length:,}: leave the task out."
            )
        return len(self.tok_encode(prompt)) + answer

    def _check_choice(self, request: Instance) -> None:
        """Raise a UserError for a continuation whose tokens, after those of its context, are not those of the whole:
        the harness would score a part of it, or nothing."""
        context, continuation = request.args
        whole = self.tok_encode(context + continuation)
        before, after = self._encode_pair(context, continuation) if context else ([], whole)
        if after and before + after == whole:
            return
        where = f"document {request.doc_id} of {request.task_name}"
        if not continuation:
            raise self._refused(f"{where}: the choice '' is empty: leave the document out, or give the choice a text.")
        raise self._refused(
            f"{where}: the tokenizer joins the choice {continuation!r} to the end of its context, {context[-20:]!r}: "
            "it has no likelihood of its own: leave the document out, or begin the choice with a space or a new line."
        )

    def _refused(self, sentence: str) -> UserError:
        """The error of a document, which one rank of several finds alone."""
        return (RankError if self.world_size > 1 else UserError)(sentence)

    def _fits(self, tokens: int, what: str) -> None:
        if tokens <= self.max_length:
            return
        if not self.truncate:
            raise self._refused(
                f"a prompt {what}has {tokens:,} tokens and the model's context {self.max_length:,}: give fewer "
                "examples (--num-fewshot), or let it be cut on the left with --truncate."
            )
        self.truncated += 1
