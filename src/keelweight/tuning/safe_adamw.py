"""AdamW that trains chosen weights only, with state for those weights only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from keelweight.errors import UserError
from keelweight.selection.mask import Mask


class _Segment:
    """The chosen entries of one parameter, and where they lie in the packed vector of their device."""

    def __init__(self, weight: nn.Parameter, positions: Tensor, start: int) -> None:
        self.weight = weight
        self.positions = positions.to(weight.device)
        self.span = slice(start, start + len(positions))

    def of(self, tensor: Tensor) -> Tensor:
        """Chosen entries of a tensor of the weight's shape, fp32, shape (n,)."""
        return tensor.detach().reshape(-1).index_select(0, self.positions).float()


class SafeAdamW(torch.optim.AdamW):
    """Torch's AdamW on the weights of a mask; no other bit of the model changes.

    The chosen weights are packed into one fp32 vector for each device, and torch's own AdamW runs on that vector.
    So moments exist for the chosen weights only (8 bytes each), each has an fp32 master (4 bytes) which a
    half-precision model rounds only for its own copy, and arithmetic, options, schedulers and `state_dict` are
    torch's. Source of the method: arXiv 2604.08297 (SET), where the mask multiplies the final update.

    Args:
        named_parameters: `model.named_parameters()`, or a part of it.
        train_only: the weights to train.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW; weight decay is 0 unless asked for (the paper's).
        keep_grads: True leaves every `.grad` on the model until `step`, as other optimizers do, so that clipping
            and scaling by a trainer see them. False packs a gradient as soon as the backward pass made it and frees
            the full one: clip with `clip_grad_norm_`, and call `close` (or leave a `with` block) at the end.
        **options: further options of torch.optim.AdamW (amsgrad, foreach, fused, ...).

    Raises:
        UserError: the mask chooses weights of a parameter that was not given, has another shape, is not contiguous
            or does not require a gradient.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        train_only: Mask,
        lr: float | Tensor = 3e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        keep_grads: bool = True,
        **options: Any,
    ) -> None:
        given = dict(named_parameters)
        self.keep_grads = keep_grads
        self._segments: dict[nn.Parameter, list[_Segment]] = {}
        self._hooks: list[Any] = []
        by_device: dict[torch.device, list[_Segment]] = {}
        for name, positions in train_only.indices.items():
            if name not in given:
                raise UserError(
                    f"the mask chooses weights of {name}, which is not among the {len(given)} parameters given "
                    f"(first: {next(iter(given), 'none')}). Training would silently leave them out."
                )
            weight = given[name]
            if tuple(weight.shape) != train_only.shapes[name]:
                raise UserError(
                    f"the mask for {name} has shape {train_only.shapes[name]}, the parameter has {tuple(weight.shape)}."
                )
            if not weight.requires_grad:
                raise UserError(f"{name} does not require a gradient, so its chosen weights would never be trained.")
            if not weight.is_contiguous():
                raise UserError(f"{name} is not contiguous in memory, so flat positions do not name its weights.")
            there = by_device.setdefault(weight.device, [])
            there.append(_Segment(weight, positions, there[-1].span.stop if there else 0))
        for segments in by_device.values():
            master = nn.Parameter(torch.cat([s.of(s.weight) for s in segments]))
            master.grad = torch.zeros_like(master)
            self._segments[master] = segments
        super().__init__(list(self._segments), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)
        if not keep_grads:
            for master, segments in self._segments.items():
                for segment in segments:
                    hook = self._pack_at_once(master, segment)
                    self._hooks.append(segment.weight.register_post_accumulate_grad_hook(hook))

    @property
    def masters(self) -> list[nn.Parameter]:
        """The packed fp32 weights, shape (n,), one vector for each device."""
        return list(self._segments)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the packed gradients down to a total norm of `max_norm`; returns the norm they had."""
        self._pack()
        return nn.utils.clip_grad_norm_(self.masters, max_norm)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One AdamW step on the chosen weights; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pack()
        super().step()
        self._write_back()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients: packed ones, and those on the parameters the mask chooses from."""
        for master, segments in self._segments.items():
            assert master.grad is not None
            master.grad.zero_()
            for segment in segments:
                segment.weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Torch's state, packed, and the fp32 masters."""
        return super().state_dict() | {"masters": [master.detach().clone() for master in self.masters]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of another SafeAdamW on the same mask, and write its weights into the model.

        Raises:
            UserError: the state belongs to a mask of another size.
        """
        rest = {key: value for key, value in state_dict.items() if key != "masters"}
        saved = state_dict.get("masters", [])
        if [len(master) for master in saved] != [len(master) for master in self.masters]:
            raise UserError(
                f"the optimizer state is for {sum(map(len, saved)):,} weights, the mask has "
                f"{sum(map(len, self.masters)):,}. Resume with the mask the run was started with."
            )
        super().load_state_dict(rest)
        with torch.no_grad():
            for master, old in zip(self.masters, saved, strict=True):
                master.copy_(old)
        self._write_back()

    def close(self) -> None:
        """Take the hooks off the model."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> SafeAdamW:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pack(self) -> None:
        """Collect the chosen entries of gradients that are still on the parameters."""
        if not self.keep_grads:
            return
        for master, segments in self._segments.items():
            assert master.grad is not None
            for segment in segments:
                if segment.weight.grad is not None:
                    master.grad[segment.span] = segment.of(segment.weight.grad)

    def _pack_at_once(self, master: nn.Parameter, segment: _Segment) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert master.grad is not None
            assert weight.grad is not None
            master.grad[segment.span] += segment.of(weight.grad)
            weight.grad = None

        return hook

    @torch.no_grad()
    def _write_back(self) -> None:
        """Put the masters into the model, rounded to its dtype."""
        for master, segments in self._segments.items():
            for segment in segments:
                flat = segment.weight.view(-1)
                flat.index_copy_(0, segment.positions, master[segment.span].to(flat.dtype))
