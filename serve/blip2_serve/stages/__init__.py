"""The stages, one class each. `app.py` makes deployments of them.

Importing any of them prepares the environment first, before torch is loaded. A replica starts by
unpickling its class, so the classes must be plain: pickled by name, and not, as Serve's decorator
would have it, by the values of all that they use, torch among them.
"""

from blip2_serve.environment import prepare_replica, stays_on_loopback

prepare_replica()
if stays_on_loopback():
    from blip2_serve.serve_internals import listen_on_loopback

    listen_on_loopback()
