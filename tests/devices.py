"""Several devices simulated on one: real numbers, and an error wherever an operation would meet two devices.

Every tensor made within the block has a place: where it was asked for, or where what it was made of is. The
host is ``cpu``, the devices are ``cpu:0``, ``cpu:1`` and so on, all of them truly the host. As with GPUs, tensors
get from one place to another by ``to``, ``cpu`` and ``copy_`` only; scalars and indices of the host go anywhere.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

HOST = torch.device("cpu")


class Devices(TorchFunctionMode):
    """Within the block, torch computes as if on several devices; see above."""

    def __init__(self) -> None:
        super().__init__()
        self.places = WeakTensorKeyDictionary()
        self.crossings = 0
        """Tensors that went from one place to another."""

    def __enter__(self) -> "Devices":
        make = Tensor._make_subclass

        def placed(cls: type, tensor: Tensor, *rest: Any) -> Tensor:
            return self.put(make(cls, tensor, *rest), self.of(tensor))

        Tensor._make_subclass = placed  # parameters are made beside torch functions
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        del Tensor._make_subclass  # torch's own, of the base class, is there again
        super().__exit__(*error)

    def of(self, tensor: Tensor) -> torch.device:
        """A tensor's place."""
        return self.places.get(tensor, HOST)

    def put(self, found: Any, place: torch.device) -> Any:
        """Say that tensors are at a place."""
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.places[leaf] = torch.device(place)
        return found

    def _together(self, func: Any, given: list[Any]) -> torch.device:
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        places = {self.of(t) for t in tensors if t.dim() or self.of(t) != HOST}
        if len(places) > 1:
            raise RuntimeError(f"{func} meets tensors on {sorted(map(str, places))}")
        return places.pop() if places else HOST

    def _moved(
        self, tensor: Tensor, rest: Iterable[Any], device: Any = None, dtype: Any = None, **options: Any
    ) -> Tensor:
        """What ``tensor.to(*rest, ...)`` returns."""
        for argument in rest:
            if isinstance(argument, Tensor):
                device, dtype = self.of(argument), argument.dtype
            elif isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, (str, torch.device)):
                device = argument
        found = tensor.to(dtype or tensor.dtype)
        if device is None or torch.device(device) == self.of(tensor):
            return found if found is tensor else self.put(found, self.of(tensor))
        self.crossings += 1
        return self.put(found.clone(), device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return self.of(args[0])
        if func == Tensor.data.__set__:
            func(*args)
            self.put(args[0], self.of(args[1]))
            return None
        if func in (Tensor.to, Tensor.cpu):
            return self._moved(args[0], args[1:] if func is Tensor.to else [HOST], **kwargs)
        if func == Tensor.numpy and self.of(args[0]) != HOST:
            raise RuntimeError("numpy asks for a tensor on the host")
        if func in (Tensor.copy_, torch._has_compatible_shallow_copy_type):  # the latter: Module.to asks about types
            return func(*args, **kwargs)
        if func == torch.autograd.grad:  # goes back through all devices; a gradient is where its tensor is
            found = func(*args, **kwargs)
            for gradient, tensor in zip(found, args[1], strict=True):
                self.put(gradient, self.of(tensor))
            return found
        place = kwargs.pop("device", None)
        checked = tree_leaves((args, kwargs))
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # indices may be on the host
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor) and self.of(leaf) == HOST]
            checked = [leaf for leaf in checked if not any(leaf is index for index in indices)]
        found_at = self._together(func, checked)
        found = func(*args, **kwargs)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and not any(leaf is other for other in checked):
                self.places[leaf] = torch.device(place) if place is not None else found_at
        return found
