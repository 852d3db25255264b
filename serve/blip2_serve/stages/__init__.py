"""The stages. Importing any of them prepares the environment first, before torch is loaded."""

from blip2_serve.environment import prepare_replica

prepare_replica()
