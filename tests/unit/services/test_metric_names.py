"""Metrics of all services in one place, as a dashboard sees them."""

from __future__ import annotations

import importlib

import pytest
from prometheus_client.metrics import MetricWrapperBase

SERVICES = ("gateway", "controller", "node_agent", "store")


@pytest.mark.parametrize("service", SERVICES)
def test_no_two_services_give_one_name_two_meanings(service: str) -> None:
    """The registry refuses a name that is taken, so importing all of them is the check."""
    for other in SERVICES:
        importlib.import_module(f"services.{other}.metrics")

    metrics = vars(importlib.import_module(f"services.{service}.metrics")).values()

    described = [metric for metric in metrics if isinstance(metric, MetricWrapperBase)]
    assert described
    assert all(family.documentation for metric in described for family in metric.describe())
