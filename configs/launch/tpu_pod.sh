#!/usr/bin/env bash
# A TPU pod slice: the same command on every worker. Usage: TPU=my-slice ZONE=us-east5-a configs/launch/tpu_pod.sh samuel:gpu
set -euo pipefail
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}" "${OUT:=gs://my-bucket/effjax}"
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "
  python3 -m venv ~/effjax-env && ~/effjax-env/bin/pip install -q 'jax[tpu]' 'effjax[study]' &&
  ~/effjax-env/bin/effjax compare $* --out $OUT --train.mesh.data -1"
