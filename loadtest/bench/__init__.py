"""Measurements; every script here runs by itself, `python loadtest/bench/NAME.py`."""
