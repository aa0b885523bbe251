"""`Checkpoint`: what a pretrained model on disk answers, whatever it is made of; `open_checkpoint` finds out what that is."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..formats import Format, Oddity, Parsed
from ..storage.gguf import gguf_at
from ..tensor import QuantTensor
from .directory import DirectoryCheckpoint
from .gguf import GgufCheckpoint
from .packed import Ready


class Checkpoint(Protocol):
    """A validated checkpoint: quantized modules, and the other tensors beside them. `load`, `inspect`, `convert`, `quantize`
    and the transformers plug-in ask nothing else of one, so a new kind of file is one class with these members.

    Names are those of the model: where a file has others, translating them is the checkpoint's business (`named_as_in`).
    Nothing is read before it is asked for, and what is read is validated first: every method raises `CheckpointError`,
    naming what is wrong.
    """

    @property
    def path(self) -> Path:
        """The directory or file, for messages and for what lies beside the weights."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What config.json says, or would say."""

    @property
    def format(self) -> Format | None:
        """How its weights are quantized; None where nothing is."""

    @property
    def quantization(self) -> Mapping[str, Any]:
        """What it says of its quantization; empty where nothing is quantized."""

    @property
    def modules(self) -> Collection[str]:
        """The quantized modules."""

    @property
    def oddities(self) -> Collection[tuple[str, Oddity]]:
        """What is strange about it apart from single weights, or left aside, by module or field."""

    def weight(self, module: str) -> Parsed:
        """The weight of a quantized module, and what is strange about it."""

    def ready(self, module: str) -> Ready | None:
        """The buffers of a quantized module as a kernel reads them, if the files have them so."""

    def weight_in_parts(self, module: str) -> Iterator[QuantTensor] | None:
        """The weight of a quantized module, some rows after others; None where `weight` is to be asked: of all but large ones in
        files whose rows can be read by themselves."""

    def weight_shape(self, module: str) -> tuple[int, int]:
        """(N, K) of what `weight_in_parts` gives."""

    @property
    def stacks(self) -> Collection[str]:
        """Stacks of quantized experts of the model it is named for ("….experts.gate_up_proj"), which are no `modules`."""

    def expert_weights(self, stack: str) -> Iterator[Parsed]:
        """The weights `[N, K]` of a stack, one expert after the other."""

    @property
    def embeddings(self) -> Collection[str]:
        """Weights of embeddings, among `names`, whose quantized form `embedding` gives, too."""

    def embedding(self, name: str) -> Iterator[QuantTensor]:
        """The weight `[vocabulary, K]` of an embedding, quantized, some rows after others."""

    def embedding_ready(self, name: str) -> Ready | None:
        """The buffers of an embedding as a kernel reads them, if the files have them so."""

    def embedding_parts(self, name: str) -> Collection[str]:
        """The names in the files of the tensors that make up an embedding."""

    def with_activations_of_the_file(self) -> Checkpoint:
        """The same checkpoint, whose weights run with the activations that it asks for; `weight` raises where no kernel has
        them."""

    def parts(self, module: str) -> Collection[str]:
        """The names in the files of the tensors that make up a quantized module or stack, its bias aside."""

    def module_nbytes(self, module: str) -> int:
        """Bytes that a quantized module or stack takes in the file."""

    def names(self) -> list[str]:
        """All other tensors, sorted: biases of quantized modules, norms, embeddings, everything that is not quantized."""

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor takes in the file."""

    def stored_as(self, name: str) -> str:
        """What the file calls its type: a dtype, or a kind of blocks that `read` dequantizes."""

    def read(self, name: str) -> Tensor:
        """A tensor that is not quantized, in memory of its own, on the CPU."""

    def in_file_order(self) -> Iterator[tuple[str, str | None]]:
        """(name, module) once for each quantized module, where its first tensor lies, and (name, None) for each other tensor."""

    def named_as_in(self, model: nn.Module, transforms: Iterable[Any] | None = None) -> Checkpoint:
        """The same checkpoint under the names of this model; what has no place in it has a name that is none of the model's.
        `transforms`: transformers' conversion mapping of the model, if it is at hand."""

    def spelling(self, name: str) -> str:
        """The name in the files of a tensor or of a quantized module, for messages; of something made of several tensors,
        the first."""

    def files(self) -> list[Path]:
        """The files that hold tensors."""

    def copy_side_files(self, target: Path) -> None:
        """Copy what a model needs besides weights and config.json: tokenizer, chat template, generation settings."""


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at a path, a directory or a GGUF file; reads headers only.

    Raises:
        CheckpointError: there is none that is sound; see `DirectoryCheckpoint.open` and `GgufCheckpoint.open`.
    """
    file = gguf_at(path)
    return DirectoryCheckpoint.open(path) if file is None else GgufCheckpoint.open(file)
