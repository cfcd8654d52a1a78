#!/usr/bin/env bash
# vLLM and its follower on loopback, and the gate that lets rollouts through on PORT. When one ends, all end.
set -euo pipefail
: "${BUCKET:?hf://buckets/NAME/wordle, what to follow}" "${VLLM_API_KEY:?a long secret, which rollouts must name}"
export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
model=${WORK_DIR:-work}/model
end_all() { trap - EXIT; kill $(jobs -p) 2>/dev/null || true; wait; }
trap end_all EXIT
trap 'exit 143' TERM

python examples/spaces/vllm/gate.py --port "${PORT:-7860}" &  # a Space must answer soon: 503 until a version is served
until deltawire materialize "$BUCKET" "$model"; do
    echo "vllm: waiting for a first version in $BUCKET" >&2
    sleep 3
done
# shellcheck disable=SC2086
python -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name policy --dtype bfloat16 \
    --host 127.0.0.1 --port 8000 --weight-transfer-config '{"backend": "deltawire"}' --enforce-eager \
    --max-model-len "${MAX_MODEL_LEN:-64}" ${VLLM_ARGUMENTS:-} &
deltawire follow --bucket "$BUCKET" --engine http://127.0.0.1:8000 --poll "${POLL:-5}" --health 8001 --json &
wait -n
exit 1
