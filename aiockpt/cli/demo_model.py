"""What the demo trains: a small GPT on the bytes of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["SIZES", "GPT", "Windows", "source_text"]

SIZES = {"tiny": (128, 4), "small": (384, 6), "medium": (768, 7)}
"""Width and layers: 1, 10 and 50 million parameters."""
HEADS = 4
CONTEXT = 128
VOCABULARY = 256  # bytes
_DROPOUT = 0.1  # so that the random state matters
_TEXT_NBYTES = 8 << 20
_SKIPPED = frozenset(("site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        split = self.attention(self.norm_1(x)).view(batch, time, 3, HEADS, width // HEADS)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.projection(attended.transpose(1, 2).reshape(batch, time, width)))
        hidden = functional.gelu(self.expand(self.norm_2(x)))
        output: torch.Tensor = x + self.dropout(self.contract(hidden))
        return output


class GPT(nn.Module):
    """Predicts the next token, in the demo the next byte.

    Args:
        width: Of the residual stream.
        layers: Number of blocks.
        vocabulary: Number of tokens, for one that reads something else than bytes.
    """

    def __init__(self, width: int, layers: int, *, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits, ``(batch, time, vocabulary)``, of ``tokens``, ``(batch, time)``."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.tokens.weight)  # tied to the embedding, as in GPT-2


class Windows:
    """Batches of text windows in shuffled order; where it stands is part of the checkpoint."""

    def __init__(self, text: torch.Tensor, *, batch: int, seed: int) -> None:
        self._text = text
        self._batch = batch
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm((len(text) - 1) // CONTEXT, generator=generator)
        self._position = 0

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next inputs and targets, ``(batch, CONTEXT)`` each, int64."""
        chosen = [(self._position + index) % len(self._order) for index in range(self._batch)]
        self._position += self._batch
        starts = (self._order[chosen] * CONTEXT).tolist()
        rows = torch.stack([self._text[start : start + CONTEXT + 1] for start in starts]).long()
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self._position = state["position"]


def source_text() -> torch.Tensor:
    """Return the source of the standard library as bytes, files in a fixed order, at most 8 MiB.

    Raises:
        FileNotFoundError: This Python has no sources with it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts))
    parts, nbytes = [], 0
    for file in files:
        parts.append(file.read_bytes())
        nbytes += len(parts[-1])
        if nbytes >= _TEXT_NBYTES:
            break
    if nbytes < 1 << 20:
        raise FileNotFoundError(f"there is no source text of the standard library in {root}")
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)[:_TEXT_NBYTES]
