"""Which class norms are of, with a stand-in for NVIDIA's apex: it shows when apex is taken, not what apex computes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sepllm_train.distributed.optional import APEX_EXTENSIONS, apex_norm
from sepllm_train.model import layers
from sepllm_train.model.build import build_model, transformer_config
from sepllm_train.model.layers import NORMS, apex_class, norm_class
from tests.model.tiny import LLAMA, PYTHIA, VOCABULARY, micro_batch, tiny_config

# As apex's classes are called, with its parameters in fp32.
NORMALIZATION = """
import torch
class FusedLayerNorm(torch.nn.LayerNorm):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__(normalized_shape, eps=eps, elementwise_affine=elementwise_affine)
class FusedRMSNorm(torch.nn.RMSNorm):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__(normalized_shape, eps=eps, elementwise_affine=elementwise_affine)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a package called apex and modules named like its extensions on the import path."""

    def put(*extensions: str, normalization: str | None = NORMALIZATION) -> None:
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex" / "__init__.py").touch()
        if normalization is not None:
            (tmp_path / "apex" / "normalization.py").write_text(normalization)
        for extension in extensions:
            (tmp_path / f"{extension}.py").touch()
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)

    yield put
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_apex_is_taken_on_a_gpu(norm: str, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install(*APEX_EXTENSIONS)
    assert apex_norm(norm, cuda=False) is None
    found = apex_norm(norm, cuda=True)
    assert found is not None and found.__module__ == "apex.normalization"
    monkeypatch.setattr(layers.torch.cuda, "is_available", lambda: True)
    assert issubclass(norm_class(norm, compiled=False), found)
    assert norm_class(norm, compiled=True) is NORMS[norm]


@pytest.mark.parametrize("extensions", [(), ("amp_C",), ("fused_layer_norm_cuda",)])
def test_apex_without_its_extensions_is_not(extensions: tuple[str, ...], install: Callable[..., None]) -> None:
    install(*extensions)
    assert apex_norm("layernorm", cuda=True) is None


@pytest.mark.parametrize("normalization", [None, "raise ImportError('built for another torch')", ""])
def test_another_apex_is_not(normalization: str | None, install: Callable[..., None]) -> None:
    """PyPI's package of that name has no such module."""
    install(*APEX_EXTENSIONS, normalization=normalization)
    assert apex_norm("layernorm", cuda=True) is None


def test_without_apex_norms_are_torchs() -> None:
    for norm, kind in NORMS.items():
        assert norm_class(norm, compiled=False) is kind
        assert issubclass(kind, (torch.nn.LayerNorm, torch.nn.RMSNorm))


@pytest.mark.parametrize(("model", "norm"), [(PYTHIA, "layernorm"), (LLAMA, "rmsnorm")])
def test_model_takes_apex_behind_the_same_interface(
    model: dict, norm: str, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    config = tiny_config(model, training={"precision": "bf16"})
    data = micro_batch(config, device=device)
    plain = build_model(config, VOCABULARY).to(device)
    install(*APEX_EXTENSIONS)
    fused = apex_norm(norm, cuda=True)
    assert fused is not None
    monkeypatch.setattr(layers, "apex_norm", lambda name, *, cuda: fused)
    other = build_model(config, VOCABULARY).to(device)
    norms = [module for module in other.modules() if isinstance(module, fused)]
    assert len(norms) == 2 * 4 + 1
    assert {parameter.dtype for parameter in other.parameters()} == {torch.bfloat16}
    assert other.state_dict().keys() == plain.state_dict().keys()
    losses = [gpt(data.tokens, data.plan, labels=data.labels) for gpt in (plain, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("sequence", [False, True])
def test_marks_and_settings_are_those_of_torchs_norms(sequence: bool, install: Callable[..., None]) -> None:
    install(*APEX_EXTENSIONS)
    fused = apex_norm("layernorm", cuda=True)
    assert fused is not None
    settings = transformer_config(
        tiny_config(parallel={"tensor": 2, "sequence": sequence}, training={"precision": "bf16"})
    )
    for kind in (NORMS["layernorm"], apex_class(fused)):
        norm = kind(config=settings, hidden_size=8, eps=1e-3)
        assert norm.eps == 1e-3
        for parameter in norm.parameters():
            assert parameter.sequence_parallel == sequence
            assert parameter.dtype == torch.bfloat16 and parameter.shape == (8,)
