#!/bin/sh
# Everything that wants a machine with several GPUs, in some 400 s: tests under NCCL, scaling, unequal heads, losses.
#   PYTHON=python OUT=folder sh benchmarks/scaling_on_gpus.sh [--tiny]    (--tiny: two processes over gloo, to try it)
# Each part has its time; what has it used up is ended, and what it printed so far stands.
PYTHON=${PYTHON:-python} OUT=${OUT:-.}
export NCCL_NVLS_ENABLE=0
scaling="$PYTHON -W ignore $(dirname "$0")/scaling.py"
part() {
    seconds=$1; shift
    echo "== $* (at most $seconds s)"
    timeout -k 5 "$seconds" "$@" 2>"$OUT/errors.txt" | tail -c 3000
    grep -E "Error|error:" "$OUT/errors.txt" | tail -n 5
}
if [ "$1" = --tiny ]; then
    part 300 $scaling --device cpu --tiny --gpus 1 2 --ways heads ring --csv "$OUT/scaling.csv"
    part 300 $scaling --device cpu --tiny --gpus 1 2 --shares 0.02 0.9 --attention sparse --steps forward
    part 300 $scaling --device cpu --tiny --gpus 1 2 --losses 20 --batch 2
    part 60 "$PYTHON" "$(dirname "$0")/scaling_model.py" --measured "$OUT/scaling.csv"
    exit
fi
part 80 "$PYTHON" -m pytest -m multigpu -x tests/parallel tests/distill/test_parallel.py
part 170 $scaling --csv "$OUT/scaling.csv"
part 60 $scaling --heads 40 --ffn 13824 --layers 2 --latents 21 90 160 --gpus 1 4 --ways heads ring --steps forward --csv "$OUT/scaling_14b.csv"
part 40 $scaling --gpus 1 4 --shares 0.01 0.19 --attention sparse --steps forward
part 50 $scaling --layers 4 --gpus 1 4 --losses 20 --batch 4
for file in scaling scaling_14b; do
    [ -f "$OUT/$file.csv" ] && part 30 "$PYTHON" "$(dirname "$0")/scaling_model.py" --gpus 1 --tokens 75600 --measured "$OUT/$file.csv"
done
