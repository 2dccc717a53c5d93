"""The model class without weights, and what is found in it: names, experts, attention, lookups."""
