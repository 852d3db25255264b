"""The stages. Whichever is imported first: the environment must be right before torch is loaded."""

from blip2_serve.environment import prepare_replica

prepare_replica()
