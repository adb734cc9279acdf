#!/usr/bin/env bash
# What is claimed of GPUs, measured on one of them: meant for eight minutes of a data-centre GPU, nothing from outside.
#
#     bash eval/benchmarks/gpu.sh [--tiny]
#
# Rows go to results/ as those of every benchmark, with the GPU in them, and results/gpu.md says what each part did. A part
# that fails or takes longer than its share costs its own rows only. --tiny shows on any machine that all parts run:
# sizes that no claim rests on, results to outputs/benchmarks. PYTHON: the interpreter; TEXTS and MODEL: folders with the
# files of E2E and a model whose tokenizer is taken (else both are made); IMAGES: a folder with CIFAR-10 (else made-up
# images, of which only times count); ONLY: run the parts whose names match this expression, and go on with gpu.md;
# TOTAL: seconds for all parts together, in place of 480.
set -u
cd "$(dirname "$0")/../.."
python=${PYTHON:-python} here=eval/benchmarks results=eval/benchmarks/results tiny=""
case "${1:-}" in
    "") ;;
    --tiny) tiny=--quick results=outputs/benchmarks ;;
    *) echo "gpu.sh: unknown option $1; there is --tiny" >&2; exit 2 ;;
esac
total=${TOTAL:-480}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
report=$results/gpu.md began=$SECONDS failed=0
[ -n "${ONLY:-}" -a -e "$report" ] || printf '| part | seconds | result |\n| --- | --- | --- |\n' > "$report"

part() {  # NAME LIMIT COMMAND...: run a part for at most LIMIT seconds; say how it ended
    local name=$1 limit=$(($2 * total / 480)) start=$SECONDS log="$work/log" said
    shift 2
    [ -z "${ONLY:-}" ] || [[ $name =~ $ONLY ]] || return 0
    if timeout --kill-after 5 "$limit" "$@" > "$log" 2>&1; then said=done; else
        said="failed ($?): $(grep -E '(Error|error):' "$log" | tail -1 | tr '|' '/' | cut -c1-160)"
        failed=$((failed + 1))
    fi
    echo "| $name | $((SECONDS - start)) | $said |" | tee -a "$report"
}

# Text and a small base model are made once. Shapes have random weights: what a step costs does not depend on them.
texts=(--data_dir "${TEXTS:-$work/data}" --model_name_or_path "${MODEL:-$work/model}" --threads 4 $tiny)
if [ -z "${TEXTS:-}${MODEL:-}" ]; then
    every=${ONLY:-} ONLY=""
    part "make data and a tokenizer" 120 "$python" - "$work" "$here" "$tiny" <<'PYTHON'
import sys
from types import SimpleNamespace
work, here, tiny = sys.argv[1:]
sys.path.insert(0, here)
from pathlib import Path
from common import data_and_model
from darel_hf.nlg.demo import DemoSettings
none = SimpleNamespace(data_dir=None, model_name_or_path=None)
data_and_model(none, Path(work), DemoSettings(warm_up_representations=20, warm_up_epochs=1, width=64, layers=2))
PYTHON
    ONLY=$every
fi

if [ -n "$tiny" ]; then
    shape=(--layers 2 --width 64) once=(--samples 8 --batch_size 4) medium=("${shape[@]}") image=() limit=300 total=1200 rest=alora
else
    shape=(--layers 24 --width 1024 --bf16) once=(--samples 64 --batch_size 32 --epochs 2 --pairs 1) limit=56
    medium=("${shape[@]}" --vocabulary 50257) rest=alora,finish_1
    image=(--bf16 --channels_last --narrow 1 --batch_size 256 --epochs 1 --workers 4 --seeds 1)
fi
share() { echo $(($1 * total / 480)); }
part "steps" 130 "$python" $here/gpu.py "${texts[@]}" --seconds "$(share 110)" --shapes '512(, 128.*)?$'
# Texts of all lengths: cuDNN would build a plan for each new shape of plain Trainer's batches, see docs/gpu.md.
part "steps on texts, cuDNN's attention last" 70 env TORCH_CUDNN_SDPA_DEPRIORITIZED=1 \
    "$python" $here/gpu.py "${texts[@]}" --seconds "$(share 55)" --shapes E2E
part "shared prompts in DPO" "$limit" "$python" $here/preferences.py "${texts[@]}" "${shape[@]}" "${once[@]}" \
    --ways shared,padding_free
part "ResNet18 on images of CIFAR-10's size" "$limit" "$python" $here/vision.py $tiny "${image[@]}" \
    ${IMAGES:+--data_dir "$IMAGES"} $([ -n "$tiny${IMAGES:-}" ] || echo --made_up 50000) --max_train_samples 50000 \
    --arms full,darel_0.5,dual,double --name vision_gpu
part "scores of the offline pass" "$limit" "$python" $here/scores.py "${texts[@]}" --samples 512 --batch_size 32
part "DistributedDataParallel, one process" "$limit" "$python" -m torch.distributed.run --nproc_per_node 1 \
    --master_port 29541 $here/prompts.py "${texts[@]}" "${medium[@]}" "${once[@]}" --ways "device,$rest"
part "one forward pass, compiled and not" "$limit" "$python" $here/steps.py $tiny --layers 24 --width 1024 --rows 32 \
    --lengths 128 --keeps 0.25,0.5 --tuning lora --bf16 --name steps_gpu
echo "all parts: $((SECONDS - began)) s, $failed failed; see $report"
exit $((failed > 0))
