"""Autoscaling policies against simulated load. Run it with `python -m loadtest.simulation`."""
