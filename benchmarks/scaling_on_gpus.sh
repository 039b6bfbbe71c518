#!/bin/sh
# Everything that wants several GPUs, four or else two, in some 580 s: scaling, tests under NCCL, losses, unequal heads,
# Wan-14B's shape.
#   PYTHON=python OUT=folder sh benchmarks/scaling_on_gpus.sh [--tiny]    (--tiny: two processes over gloo, to try it)
# What matters most comes first; what needs not all GPUs runs at once, on GPUs of its own. Each part has its time, all
# have $LIMIT seconds; what has used it up is ended with all its processes, and the rows that it measured stand.
PYTHON=${PYTHON:-python} OUT=${OUT:-.} LIMIT=${LIMIT:-580}
here=$(dirname "$0") kept=$(mktemp -d) begin=$(date +%s)
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 TORCHINDUCTOR_COMPILE_THREADS=8 PYTHONUNBUFFERED=1
spent() { echo $(($(date +%s) - begin)); }

# part NAME SECONDS GPUS COMMAND …: what it prints and how it ends is kept, until `shown NAME`.
part() {
    name=$1 seconds=$2 gpus=$3 left=$((LIMIT - $(spent))); shift 3
    [ "$seconds" -lt "$left" ] || seconds=$left
    [ "$seconds" -gt 5 ] || { echo "no time left" >"$kept/$name.code"; return; }
    CUDA_VISIBLE_DEVICES=$gpus timeout -k 3 "$seconds" "$@" >"$kept/$name.out" 2>"$kept/$name.err"
    echo $? >"$kept/$name.code"
    { echo "== $name, after $(spent) s"; cat "$kept/$name.out" "$kept/$name.err"; } >>"$OUT/log.txt"
}
shown() {
    [ -f "$kept/$1.code" ] || return
    echo "== $1: exit code $(cat "$kept/$1.code"), $(spent) s so far"
    [ ! -f "$kept/$1.out" ] || tail -n "$2" "$kept/$1.out" | tail -c 1800
    [ "$(cat "$kept/$1.code")" = 0 ] || grep -hE "Error|error:" "$kept/$1.err" 2>/dev/null | sort -u | tail -n 5 | cut -c -300
}
scaling() { name=$1 time=$2 gpus=$3; shift 3; part "$name" "$time" "$gpus" "$PYTHON" -W ignore "$here/scaling.py" $on "$@"; }
tests() { part "$1" 200 "$2" "$PYTHON" -m pytest --tb=line -o timeout=120 -m "$3" tests/parallel tests/distill/test_parallel.py tests/test_cli.py tests/examples; }

on="" one=0 two=1,2 three=3 first=0,1 second=2,3 all=0,1,2,3 many=4 latents="16 32 32"
[ "$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")" -ge 4 ] || three=1 second=0,1 all=0,1 many=2
large="--heads 40 --ffn 13824 --layers 2 --latents 21 90 160 --ways heads ring --steps forward --rows $kept/large"
small="--rows $kept/small" unequal="--shares 0.01 0.19 --attention sparse --steps forward --rows $kept/unequal"
losses="--heads 24 --head-size 64 --layers 4 --losses 20 --rows $kept/losses"
[ "$1" = --tiny ] && on="--device cpu --tiny" many=2 latents="4 32 32"

scaling "1 GPU" 200 $one $small --gpus 1 &
[ $many = 2 ] || scaling "2 GPUs" 200 $two $small --gpus 2 &
{ scaling "losses of 1 GPU" 120 $three $losses --latents $latents --gpus 1; scaling "14B, 1 GPU" 80 $three $large --gpus 1; } &
wait
scaling "all GPUs" 180 $all $small --gpus $many
scaling "table" 20 $one $small --gpus 0 --csv "$OUT/scaling.csv"
shown "1 GPU" 0; shown "2 GPUs" 0; shown "all GPUs" 0; shown "table" 20
[ -n "$on" ] || { tests "tests" $first "multigpu and not slow" & tests "slow tests" $second "multigpu and slow" & wait; }
shown "tests" 12; shown "slow tests" 20
scaling "losses" 80 $all $losses --latents $latents --gpus $many
shown "losses of 1 GPU" 0; shown "losses" 8
scaling "unequal heads" 50 $all $unequal --gpus $many --csv "$OUT/unequal.csv"
shown "unequal heads" 8
scaling "14B" 70 $all $large --gpus $many --csv "$OUT/scaling_14b.csv"
shown "14B, 1 GPU" 0; shown "14B" 10
for file in scaling scaling_14b; do
    [ ! -f "$OUT/$file.csv" ] || "$PYTHON" -W ignore "$here/scaling_model.py" --models --measured "$OUT/$file.csv"
done
rm -r "$kept"
