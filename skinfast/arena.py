"""Arenas: tensors that lie one behind the other in one flat tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

# Bytes at whose multiples a tensor begins: as torch's own do on a CPU; on a GPU what a warp reads
# with 8 bytes a thread.
_CPU_ALIGNMENT = 64
_GPU_ALIGNMENT = 256


def zeros_like(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None
) -> list[Tensor]:
    """For each tensor zeros of its shape and strides, in one arena for each dtype and device.

    They share memory's ownership and nothing else: each has a version of its own, as autograd
    counts them.

    Args:
        tensors: of any dtypes and layouts, on any devices. For one that is not dense the strides
            are those of ``torch.zeros_like``.
        dtypes: of the results; None: as the tensors have.
    """
    dtypes = dtypes or [tensor.dtype for tensor in tensors]
    # The strides of zeros_like, without its memory.
    likes = [
        torch.empty_like(tensor, dtype=dtype, device="meta")
        for tensor, dtype in zip(tensors, dtypes, strict=True)
    ]
    kinds = [(tensor.device, dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    sizes = dict.fromkeys(kinds, 0)
    offsets = []
    for kind, like in zip(kinds, likes, strict=True):
        alignment = _CPU_ALIGNMENT if kind[0].type == "cpu" else _GPU_ALIGNMENT
        step = alignment // like.itemsize
        offsets.append(sizes[kind])
        sizes[kind] += (like.numel() + step - 1) // step * step
    arenas = {
        (device, dtype): torch.zeros(size, dtype=dtype, device=device)
        for (device, dtype), size in sizes.items()
    }
    # `data`: views made by slicing share one version counter.
    return [
        arenas[kind].as_strided(like.shape, like.stride(), offset).data
        for kind, like, offset in zip(kinds, likes, offsets, strict=True)
    ]


@torch.no_grad()
def lay_out(model: nn.Module) -> None:
    """Move a model's parameters into an arena for each dtype, and its buffers into others.

    They remain the same objects in the same memory formats, so optimizers, hooks and tied layers
    never notice. What lies in such arenas already stays where it is. ``copy.deepcopy`` of the model
    and ``model.to`` another device or dtype make parameters with memory of their own again.
    """
    for tensors in (list(model.parameters()), list(model.buffers())):
        if len(flat(tensors)) > len({(tensor.device, tensor.dtype) for tensor in tensors}):
            for tensor, place in zip(tensors, zeros_like(tensors), strict=True):
                tensor.data = place.copy_(tensor)


def flat(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The memory that the tensors lie in, each piece once, as a tensor ``[N]``.

    For an arena that is the whole of it, gaps included; for a tensor with memory of its own that.
    So what treats all elements alike treats a model in as many calls as it has arenas.
    """
    owners = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return [
        owner.detach().as_strided((owner.untyped_storage().nbytes() // owner.itemsize,), (1,), 0)
        for owner in owners.values()
    ]
