"""Figures that say how good a classifier is."""

from __future__ import annotations

from skinfast.evaluation.metrics import classification_metrics

__all__ = ["classification_metrics"]
