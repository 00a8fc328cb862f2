"""What the recurrent modules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastattn.nn._dynamo import admit

CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def weights_of(module: Any, names: Sequence[str]) -> list[Any]:
    """The weights by name, read anew in every call: they may be those of a functional_call, or
    computed ones (weight norm, parametrisations), which are attributes and no parameters."""
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:
        return [getattr(module, name) for name in names]


def check_dropout(p: Any) -> float:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
        raise ValueError(f"recurrent_dropout should be a number in range [0, 1), got {p!r}")
    return float(p)


class Layers:
    """Mixed into torch's modules: the arguments that they have not."""

    backend: str = "auto"
    recurrent_dropout: float = 0.0

    def _adopt(self, recurrent_dropout: float, backend: str) -> None:
        self.recurrent_dropout = check_dropout(recurrent_dropout)
        self.backend = backend

    def _run(self, op: Any, x: Any, state: Any, lengths: Any, **more: Any) -> Any:
        """The op on the module's weights, with its options."""
        module: Any = self
        training = module.training
        return op(
            x, state, weights_of(module, module._flat_weights_names), lengths=lengths,
            batch_first=module.batch_first, bidirectional=module.bidirectional,
            dropout_p=module.dropout if training else 0.0,
            recurrent_dropout_p=self.recurrent_dropout if training else 0.0, backend=self.backend,
            **more,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        if self.recurrent_dropout:
            text += f", recurrent_dropout={self.recurrent_dropout}"
        return text


admit(Layers)
