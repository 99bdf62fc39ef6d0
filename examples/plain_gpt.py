"""Train a plain PyTorch GPT with separator attention on bytes of text; needs torch and `sep_attention`, nothing else.

python examples/plain_gpt.py FILE... [--steps 200]
"""

import argparse
from pathlib import Path

import torch
from sep_attention import AttentionPlan, build_plan, sep_attention
from torch import Tensor, nn

SEPARATORS = torch.tensor(list(b".,:;!?\n"))
LENGTH, WINDOW, WIDTH, HEADS, LAYERS = 512, 64, 64, 4, 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        # [B, S, 3 * H * D] -> three of [B, H, S, D]: views are fine.
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(sep_attention(q, k, v, plan, window=WINDOW).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, S, 256] of ids, i64 [B, S]."""
        # One plan for all layers: separators and the first tokens are seen from everywhere, the others in the window.
        plan = build_plan(torch.isin(ids, SEPARATORS.to(ids.device)), initial_tokens=3)
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, plan)
        return self.head(x)


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    data = torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in options.files)), dtype=torch.uint8)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, losses = GPT().to(device), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(data) - LENGTH, (8,)).tolist()
        ids = torch.stack([data[start : start + LENGTH + 1] for start in starts]).long().to(device)
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
