"""Checks that a bank fits a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mslora_cr.banks.bank import Bank, BankError


def check_fits(bank: Bank, linears: Mapping[str, nn.Linear], architecture: str) -> None:
    """Refuse a bank of another model family or size.

    Args:
        linears: The layers that banks adapt in the model, by name.

    Raises:
        BankError: The bank was trained on another architecture, or its layers or their sizes differ.
    """
    trained_on = bank.metadata.get("base_model")
    if isinstance(trained_on, Mapping) and trained_on.get("architecture") not in (None, architecture):
        raise BankError(
            f"bank {bank.name!r} was trained on {trained_on['architecture']}, but the base model is {architecture}"
        )
    if set(bank.matrices) != set(linears):
        odd = sorted(set(bank.matrices) ^ set(linears))
        raise BankError(f"bank {bank.name!r} and the model differ in {len(odd)} linear layers, first {odd[0]}")
    for name, (a, b) in bank.matrices.items():
        linear = linears[name]
        if (b.shape[0], a.shape[1]) != (linear.out_features, linear.in_features):
            raise BankError(
                f"bank {bank.name!r}: {name} is {b.shape[0]} × {a.shape[1]}, the model's "
                f"{linear.out_features} × {linear.in_features}"
            )
