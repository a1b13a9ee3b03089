# SPDX-License-Identifier: Apache-2.0
"""Exact byte counts of a model's weights and training state, every tensor at full cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slope_ext import _packed
from slope_ext._check import metadata_words
from slope_ext.linear import SLoPeLinear
from slope_ext.sparse_layer import SparseLayer


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Bytes of a model as it is, beside the same model with dense linear layers.

    ``weights``: parameters and persistent buffers, what a checkpoint holds, and the metadata of
    weights on a GPU. ``backward_copy``: derived buffers that backward reads. ``gradients``:
    one per trained parameter, in its dtype. ``optimizer``: two moments per trained parameter, and
    masters where asked for.
    """

    weights: int
    backward_copy: int
    gradients: int
    optimizer: int
    dense_weights: int
    dense_gradients: int
    dense_optimizer: int

    @property
    def training(self) -> int:
        """Bytes of the training state."""
        return self.weights + self.backward_copy + self.gradients + self.optimizer

    @property
    def dense_training(self) -> int:
        """Bytes of the training state of the dense model."""
        return self.dense_weights + self.dense_gradients + self.dense_optimizer

    @property
    def training_ratio(self) -> float:
        """Training state over that of the dense model; below 1 is smaller."""
        return self.training / self.dense_training if self.dense_training else 1.0

    @property
    def inference_ratio(self) -> float:
        """Weights over those of the dense model; below 1 is smaller."""
        return self.weights / self.dense_weights if self.dense_weights else 1.0


def memory_report(
    model: nn.Module,
    *,
    moments: torch.dtype = torch.float32,
    master_weights: bool = False,
    on_gpu: bool = False,
) -> MemoryReport:
    """Counts bytes from shapes and dtypes; the model may be on the meta device.

    Adapters count in full on the sparse side only. Tensors that appear twice (tied weights) count
    once.

    Args:
        model: any model, sparse layers or not.
        moments: dtype of the two optimizer moments.
        master_weights: whether fp16 and bf16 parameters have fp32 masters.
        on_gpu: count the metadata that the own product on sm_90 has of 16-bit layers, wherever the
            model is now.
    """
    parameters = list(model.parameters())
    persistent, metadata, transposed = _buffer_bytes(model)
    # What a sparse layer's weight, masks and adapter would be as one dense weight.
    layers = {id(m.weight): m for m in model.modules() if isinstance(m, SparseLayer)}
    for layer in layers.values() if on_gpu else ():
        if isinstance(layer, SLoPeLinear):
            rows, columns = layer.out_features, layer.in_features
            if layer.weight_metadata is None:
                metadata += _metadata_bytes(layer, rows, columns)
            if layer.weight_t is not None and layer.weight_t_metadata is None:
                transposed += _metadata_bytes(layer, columns, rows)
    masks = {id(layer.mask): layer.mask for layer in layers.values()}
    adapters = {
        id(p) for m in model.modules() if isinstance(m, SparseLayer) for p in (m.lora_A, m.lora_B)
    }

    def optimizer_bytes(elements: int, dtype: torch.dtype) -> int:
        master = 4 if master_weights and dtype.itemsize == 2 else 0
        return elements * (2 * moments.itemsize + master)

    weights = gradients = optimizer = dense_weights = dense_gradients = dense_optimizer = 0
    for parameter in parameters:
        size, elements = _bytes(parameter), parameter.numel()
        sparse = layers.get(id(parameter))
        dense_elements = elements if sparse is None else sparse.in_features * sparse.out_features
        dense_size = dense_elements * parameter.element_size()
        weights += size
        if id(parameter) not in adapters:
            dense_weights += dense_size
        if parameter.requires_grad:
            gradients += size
            optimizer += optimizer_bytes(elements, parameter.dtype)
            if id(parameter) not in adapters:
                dense_gradients += dense_size
                dense_optimizer += optimizer_bytes(dense_elements, parameter.dtype)
    return MemoryReport(
        weights=weights + persistent + metadata,
        backward_copy=transposed,
        gradients=gradients,
        optimizer=optimizer,
        dense_weights=dense_weights + persistent - sum(_bytes(mask) for mask in masks.values()),
        dense_gradients=dense_gradients,
        dense_optimizer=dense_optimizer,
    )


def _buffer_bytes(model: nn.Module) -> tuple[int, int, int]:
    """Bytes of persistent buffers, of the forward products' metadata, of backward copies."""
    persistent, metadata, backward = {}, {}, {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                persistent[id(buffer)] = _bytes(buffer)
            elif name == "weight_metadata":
                metadata[id(buffer)] = _bytes(buffer)
            elif isinstance(module, SparseLayer):
                backward[id(buffer)] = _bytes(buffer)
    return sum(persistent.values()), sum(metadata.values()), sum(backward.values())


def _metadata_bytes(layer: SLoPeLinear, rows: int, columns: int) -> int:
    """Of the own product's metadata for a weight [rows, columns] of a layer, if it takes that."""
    taken = _packed.native_takes(rows, columns, layer.weight.dtype, layer.backend)
    return 4 * metadata_words(rows, columns) if taken else 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
