#!/usr/bin/env bash
# Checks the image from inside, as its user; started by image-test.sh. /mnt has the objects of the
# overlay dev-cpu.
set -euo pipefail
cd /tmp

PICTURE=/opt/blip2/venv/lib/python3.11/site-packages/blip2_serve/demo/picture.png

trap 'echo "FAILED in line $LINENO" >&2' ERR

say() { echo "-- $*"; }
fail() {
    echo "FAILED: $*" >&2
    tail -n 50 /tmp/*.log >&2 || true
    exit 1
}

until_ready() {
    for _ in {1..300}; do
        if wget -q -T 10 -O /dev/null http://127.0.0.1:8000/ready; then return; fi
        kill -0 "$1" || fail "the server exited"
        sleep 1
    done
    fail "the server was not ready within 300 s"
}

caption() {
    wget -q -T 60 -O answer.json --header 'Content-Type: application/json' \
        --post-file request.json http://127.0.0.1:8000/v1/caption || fail "the request for a caption failed"
    cat answer.json
    echo
    grep -q "a large red square at the top left" answer.json || fail "the caption is wrong"
}

# Not `grep -q`, which exits early and makes wget fail with a broken pipe.
page_has() { wget -T 5 -q -O- "$1" | grep "$2" >/dev/null || fail "$1 has no line with $2"; }

python -c "
import base64, json
picture = base64.b64encode(open('$PICTURE', 'rb').read()).decode()
print(json.dumps({'image': 'data:image/png;base64,' + picture}))" >request.json

# Extract what KubeRay starts a worker with: its environment and its command line.
python - <<'END'
import yaml

objects = list(yaml.safe_load_all(open("/mnt/objects.yaml")))
service = next(o for o in objects if o["kind"] == "RayService")
environment = next(o for o in objects if o["kind"] == "ConfigMap")["data"]
group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
open("serve.yaml", "w").write(service["spec"]["serveConfigV2"])
with open("ray.env", "w") as file:
    file.writelines(f"export {name}={value}\n" for name, value in environment.items())
cpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
resources = ",".join(f'"{name}":{value}' for name, value in group["resources"].items())
open("start-arguments", "w").write(f"--num-cpus={cpus} --resources={{{resources}}}\n")
END

say "user $(id -u):$(id -g), $(python --version), $(df -h / | awk 'END {print $2}') file system"
if touch /opt/blip2/written 2>/dev/null || touch /written 2>/dev/null; then
    fail "the root file system is writable"
fi
python /opt/blip2/weights.py --help >/dev/null || fail "weights.py --help failed"

say "the image's own command: blip2-serve up"
blip2-serve up --host 0.0.0.0 >up.log 2>&1 &
server=$!
until_ready $server
caption
kill -TERM $server
wait $server || fail "the server exited with status $?"

say "as a pod of KubeRay: ray start, serveConfigV2, token, HAProxy"
# shellcheck disable=SC1091
source ray.env
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef
read -ra arguments <start-arguments
ray start --head --block --dashboard-host=0.0.0.0 --metrics-export-port=8080 \
    --dashboard-agent-listen-port=52365 "${arguments[@]}" >ray.log 2>&1 &
ray=$!
for _ in {1..60}; do
    if wget -q -T 5 -O- http://127.0.0.1:8265/api/gcs_healthz 2>/dev/null | grep -q success; then
        break
    fi
    sleep 1
done
serve deploy serve.yaml --address http://127.0.0.1:8265 >deploy.log 2>&1 || fail "serve deploy failed"
until_ready $ray
caption
# The probes of KubeRay's pods, and the pages that Prometheus scrapes.
page_has http://127.0.0.1:52365/api/local_raylet_healthz success
page_has http://127.0.0.1:8265/api/gcs_healthz success
page_has http://127.0.0.1:8000/-/healthz success
page_has http://127.0.0.1:9101/metrics '^haproxy_'
page_has http://127.0.0.1:8080/metrics '^ray_'
for process in /proc/[0-9]*/cmdline; do tr '\0' ' ' <"$process" 2>/dev/null || true; done >commands
grep -E 'bin/haproxy .*-dS ' commands >/dev/null || fail "no HAProxy runs with -dS"
say "all checks passed"
