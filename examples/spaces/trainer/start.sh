#!/usr/bin/env bash
# The trainer, from the bucket's newest version on; its records are files that anyone who reaches PORT may read.
set -euo pipefail
: "${BUCKET:?hf://buckets/NAME/wordle, where to publish}"
: "${ENGINE_URL:?where the gate of vLLM answers}" "${ENVIRONMENT_URL:?where the environment answers}"
work=${WORK_DIR:-work}
mkdir -p "$work/public"
end_all() { trap - EXIT; kill $(jobs -p) 2>/dev/null || true; wait; }
trap end_all EXIT
trap 'exit 143' TERM

acts=()
for act in ${ACTS:-learn,5e-4,80 rl,2e-6,20}; do acts+=(--act "$act"); done
train() {  # in the background, so that a signal reaches it through end_all
    exec python -m examples.wordle.trainer --model "$work/model" --bucket "$BUCKET" "${acts[@]}" \
        --engine "$ENGINE_URL" --environment "$ENVIRONMENT_URL" --wait 3600 --patience 600 \
        --metrics "$work/public/steps.jsonl" --digests "$work/public/digests.json"
}

python -m http.server "${PORT:-7860}" --directory "$work/public" &  # a Space must answer soon, and stay after training
python -m examples.wordle.model "$work/model"
# When a server it needs goes away the trainer ends, having published what it captured; it goes on where it stopped.
until train & wait $!; do
    echo "trainer: starting again in 5 s" >&2
    sleep 5
done
wait
