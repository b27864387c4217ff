#!/usr/bin/env bash
# A TPU pod slice: the same command on every worker. Usage, from the clone:
#   TPU=my-slice ZONE=us-east5-a OUT=gs://my-bucket/run configs/launch/tpu_pod.sh samuel:gpu
# The wheel of this clone goes to all workers. Where a worker is told to stop, the run saves, exits with 75 on all of
# them, and the same command goes on from there; after the slice itself was lost, make another and give it again.
#   EFFJAX_WHEEL  a wheel that is there already, made by `pip wheel --no-deps .`
set -euo pipefail
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}" "${OUT:?gs://BUCKET/FOLDER}"
wheel=${EFFJAX_WHEEL:-}
if [ -z "$wheel" ]; then
  built=$(mktemp -d)
  python3 -m pip wheel -q --no-deps --wheel-dir "$built" "$(dirname "$0")/../.."
  wheel=$(echo "$built"/effjax-*.whl)
fi
name=$(basename "$wheel")
words=$(printf '%q ' "$@" --out "$OUT")
gcloud compute tpus tpu-vm scp "$wheel" "$TPU:$name" --zone "$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "
  [ -d ~/effjax-env ] || python3 -m venv ~/effjax-env
  ~/effjax-env/bin/pip install -q 'jax[tpu]' ~/'${name}[study,text,gcs]' || exit 1
  while :; do
    ~/effjax-env/bin/effjax compare $words --distributed --train.mesh.data -1
    status=\$?
    [ \$status -eq 75 ] || exit \$status
  done"
