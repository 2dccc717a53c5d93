"""Turning a model by what is seen or learned of it, before the plan."""
