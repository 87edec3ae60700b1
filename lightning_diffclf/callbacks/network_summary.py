"""What is trained, in a line."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import get_human_readable_count


class NetworkSummary(ModelSummary):
    """In place of Lightning's table: the parts of the module that have weights, and how many are trained.

    Lightning's also lists what callbacks add to the module, and operations that nothing has counted yet.
    """

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print it, on the first process; arguments as Lightning gives them."""
        columns = dict(summary_data)  # what belongs to no part is of type "n/a"
        parts = [
            f"{name} ({', '.join(one for one in (kind, count.strip()) if one != 'n/a')})"
            for name, kind, count in zip(columns["Name"], columns["Type"], columns["Params"], strict=True)
            if count.strip() not in ("0", "--")
        ]
        trained = get_human_readable_count(trainable_parameters).strip()
        print(f"network: {', '.join(parts)}; {trained} weights are trained", flush=True)
