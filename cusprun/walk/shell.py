"""A stock transformers decoder that holds one block at a time.

The blocks, masks and rotary embeddings are transformers' own code: the decoder is built without storage,
its list of blocks is set to the one block that is loaded, and its own ``forward`` is called on hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.prefetch import prefetch_layer
from cusprun.checkpoint.reader import layer_tensors, read_tensor
from cusprun.errors import ModelError
from cusprun.walk.arithmetic import is_linear_weight, round_products
from cusprun.walk.batches import Batch
from cusprun.walk.device import CPU, Device
from cusprun.walk.spill import Spill


class DecoderShell:
    """Runs the blocks of one checkpoint on one device, each loaded when asked for.

    All is float32 but for the products of linear layers, whose type is the device's ``dtype``.
    """

    def __init__(self, index: CheckpointIndex, device: Device = CPU) -> None:
        self.index = index
        self.device = device
        decoder = _empty_decoder(index)
        self._blocks = list(decoder.layers)
        self._embedding = decoder.embed_tokens
        self._norm = decoder.norm
        decoder.embed_tokens = decoder.norm = nn.Identity()
        _move_buffers(decoder, device)
        self._decoder = decoder.eval()
        self._layer_types = getattr(decoder.config, "layer_types", None)

    @property
    def products(self) -> torch.dtype:
        """The type in which linear layers multiply."""
        found: torch.dtype = getattr(torch, self.device.dtype)
        return found

    def embed_into(self, hidden: Spill, batches: Sequence[Batch]) -> None:
        """Leave the input of block 0 in ``hidden``, one batch in memory at a time.

        Only the rows of a batch's tokens are cast, so that neither a large vocabulary nor a large corpus
        costs memory. The host does this: it is a copy from one file to another.

        Raises:
            ModelError: a token has no row in the embedding.
        """
        if not batches:  # a rank can have none
            return
        table = read_tensor(self.index, self.index.family.embedding_name())
        highest = max(int(batch.token_ids.max()) for batch in batches)
        if highest >= table.shape[0]:
            raise ModelError(
                f"{self.index.folder}: its tokenizer gives the token {highest}, but the embedding has "
                f"{table.shape[0]} rows; use the tokenizer that belongs to the model"
            )
        embedding = copy.deepcopy(self._embedding)
        embedding.padding_idx = None
        with torch.inference_mode():
            for position, batch in enumerate(batches):
                used = torch.unique(batch.token_ids)
                embedding.weight = nn.Parameter(table[used].float(), requires_grad=False)
                hidden.write(position, embedding(torch.searchsorted(used, batch.token_ids)))
        prefetch_layer(self.index, 0)

    def load_block(self, layer: int) -> nn.Module:
        """Return decoder block ``layer`` with its weights; drop it to free them.

        Weights travel in the type that they are stored in, and are cast on the device. The next block is read
        ahead while this one computes.
        """
        prefix = self.index.family.layer_prefix(layer)
        block: nn.Module = copy.deepcopy(self._blocks[layer]).eval()
        weights = {}
        for full, tensor in layer_tensors(self.index, layer):
            name = full.removeprefix(prefix)
            dtype = self.products if is_linear_weight(block, name) else torch.float32
            weights[name] = self.device.put(tensor).to(dtype)
        _assign(block, weights)
        round_products(block)
        prefetch_layer(self.index, layer + 1)
        return block

    def load_norm(self) -> nn.Module:
        """Return the final norm with its float32 weights."""
        norm: nn.Module = copy.deepcopy(self._norm)
        weight = read_tensor(self.index, self.index.family.final_norm_name())
        _assign(norm, {"weight": self.device.put(weight).float()})
        return norm

    @contextmanager
    def holding(self, layer: int, block: nn.Module) -> Iterator[None]:
        """Make ``block`` the decoder's only block, in the place of block ``layer``."""
        self._decoder.layers = nn.ModuleList([block])
        if self._layer_types is not None:
            self._decoder.config.layer_types = [self._layer_types[layer]]
        try:
            yield
        finally:
            self._decoder.layers = nn.ModuleList()
            if self._layer_types is not None:
                self._decoder.config.layer_types = self._layer_types

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the held block on hidden states: float32 [documents, tokens, hidden_size], same out."""
        with torch.inference_mode():
            output: torch.Tensor = self._decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return output


def _move_buffers(decoder: nn.Module, device: Device) -> None:
    """Put the rotary tables, and whatever else a decoder computes with, on the device."""
    for module in decoder.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = device.put(buffer)


def _assign(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    # Nothing is trained: a gradient's graph would keep intermediate results of the weights alive.
    module.requires_grad_(False).load_state_dict(dict(weights), strict=True, assign=True)


def _model_class() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _empty_decoder(index: CheckpointIndex) -> Any:
    """Return the stock decoder without storage for its weights."""
    config = load_config(index)
    try:
        with torch.device("meta"):
            model = _model_class().from_config(
                config, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False
            )
        _fill_buffers(model)
        decoder = model.get_submodule(index.family.modules.decoder)
    except Exception as error:  # tables of activations and of rotary kinds, sizes: many types
        raise _refused(index, error) from None
    return decoder


def _fill_buffers(model: Any) -> None:
    """Give storage and values to what no checkpoint stores: rotary tables, the scale of an embedding.

    Stock models compute these in ``_init_weights``, since they too are built without storage when loaded.
    """
    for module in model.modules():
        empty = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name, buffer in empty:
            module._buffers[name] = torch.full_like(buffer, torch.nan, device="cpu")
        if empty:
            model._init_weights(module)
        for name, _ in empty:
            if module.get_buffer(name).isnan().any():
                raise RuntimeError(f"{type(module).__name__} leaves its {name} empty")


def load_config(index: CheckpointIndex) -> Any:
    """Return the stock config of a checkpoint; raises ``ModelError`` when transformers refuses it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(index.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the strict configs of transformers raise many types
        raise _refused(index, error) from None


def _refused(index: CheckpointIndex, error: Exception) -> ModelError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ModelError(
        f"{index.folder / 'config.json'} is refused by transformers ({reason}); mend the config"
    )
