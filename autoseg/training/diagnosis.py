"""When the loss is no longer a number: find out where it began."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoseg import runtime
from autoseg.training.batches import Batch


def diagnose(
    network: nn.Module,
    batch: Batch,
    *,
    loss: float,
    gradient_norm: float,
    device: torch.device,
    precision: str,
) -> tuple[str, ...]:
    """What is known of a step that gave no finite numbers: cases, layer and values, a sentence each.

    Args:
        network: With the weights that the step computed with (not changed by it); left as it is.
        batch: What the step saw.
        loss: Its loss.
        gradient_norm: Norm of its gradient.
        device: Where the network is.
        precision: Of the forward pass.
    """
    findings = [f"loss {loss}, gradient norm {gradient_norm}, cases of the batch: {', '.join(batch.case_ids)}"]
    findings += _bad_samples(batch)
    bad_weights = [name for name, weight in network.named_parameters() if not bool(torch.isfinite(weight).all())]
    if bad_weights:
        findings.append(f"weights that are not finite: {bad_weights[0]} and {len(bad_weights) - 1} others")
    layer = _first_bad_layer(network, batch.images, device, precision)
    findings.append(layer or "every layer's output is finite: the loss or its gradient overflows")
    bad_gradients = [
        name
        for name, weight in network.named_parameters()
        if weight.grad is not None and not bool(torch.isfinite(weight.grad).all())
    ]
    if bad_gradients:
        findings.append(f"gradients that are not finite: {bad_gradients[0]} and {len(bad_gradients) - 1} others")
    return tuple(findings)


def _bad_samples(batch: Batch) -> list[str]:
    return [
        f"case {case_id}: its patch holds {int((~torch.isfinite(image)).sum())} values that are not finite"
        for case_id, image in zip(batch.case_ids, batch.images, strict=True)
        if not bool(torch.isfinite(image).all())
    ]


def _first_bad_layer(network: nn.Module, images: Tensor, device: torch.device, precision: str) -> str:
    """The first layer whose output is not finite, with its largest finite input; "" when there is none."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if found or not isinstance(output, Tensor) or bool(torch.isfinite(output).all()):
                return
            value = output[~torch.isfinite(output)][0].item()
            given = inputs[0].float() if inputs and isinstance(inputs[0], Tensor) else torch.zeros(1)
            largest = torch.nan_to_num(given, 0.0, 0.0, 0.0).abs().max().item()
            found.append(f"layer {name} is the first to give {value}; its input reaches {largest:.4g}")

        return hook

    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    # Running statistics follow every forward pass.
    statistics = [(weight, weight.clone()) for weight in network.parameters() if not weight.requires_grad]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad(), runtime.autocast(device, precision):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for weight, before in statistics:
                weight.copy_(before)
    return found[0] if found else ""
