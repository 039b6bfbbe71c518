#!/bin/sh
# Everything that wants several GPUs, four or else two, in some 480 s: forwards, training steps, losses, tests under
# NCCL, unequal heads, Wan-14B's shape.
#   PYTHON=python OUT=folder sh benchmarks/scaling_on_gpus.sh [--tiny] [forward] [training] [losses] [tests] [unequal] [14B]
# --tiny: processes over gloo, to try it; no names: all parts, what matters most first. Each part has its time, all have
# $LIMIT seconds; what has used it up is ended with all its processes, and the rows that it measured stand. Losses and
# tests, which are not timed, run beside unequal heads and 14B, each test file on a pair of GPUs. $OVERLAPS: exchanges that are
# measured (scaling.py --help), the first of them with all else.
PYTHON=${PYTHON:-python} OUT=${OUT:-.} LIMIT=${LIMIT:-480} OVERLAPS=${OVERLAPS:-on}
here=$(dirname "$0") kept=$(mktemp -d) begin=$(date +%s)
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export TORCHINDUCTOR_COMPILE_THREADS=8 TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$kept/triton}"  # one for all GPUs
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
# shown NAME LINES: the last of them, and what was wrong.
shown() {
    [ -f "$kept/$1.code" ] || return
    echo "== $1: exit code $(cat "$kept/$1.code"), $(spent) s so far"
    [ ! -f "$kept/$1.out" ] || grep -v "^|" "$kept/$1.out" | tail -n "$2" | cut -c -150
    [ "$(cat "$kept/$1.code")" = 0 ] || grep -hE "Error|error:|SIG|Fatal" "$kept/$1.err" 2>/dev/null | sort -u | tail -n 4 | cut -c -250
}
scaling() { name=$1 time=$2; shift 2; part "$name" "$time" "$all" "$PYTHON" -W ignore "$here/scaling.py" "$@"; }
# table NAME ARGUMENTS …: of the rows that there are, where the part was ended before it could print its own.
table() {
    [ "$(cat "$kept/$1.code" 2>/dev/null)" = 0 ] && return; shift
    "$PYTHON" -W ignore "$here/scaling.py" "$@" --gpus 0 >>"$OUT/tables.txt" 2>&1
}
tests() { part "$1" 185 "$2" "$PYTHON" -m pytest --tb=line -o timeout=180 -m "$3" "$4"; }
wanted() { [ -z "$parts" ] || case " $parts " in *" $1 "*) ;; *) false ;; esac; }

on="" gpus="1 4 2" all=0,1,2,3 first=0,1 second=2,3 latents="16 32 32"
[ "$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")" -ge 4 ] || gpus="1 2" all=0,1 second=0,1
[ "$1" = --tiny ] && { on="--device cpu --tiny" gpus="1 2" latents="4 32 32"; shift; }
parts=$*
most=${gpus#1 } most=${most%% *} how=${OVERLAPS%% *}
forward="$on --gpus $gpus --steps forward --overlap $OVERLAPS --rows $kept/forward --csv $OUT/scaling.csv"
training="$on --gpus $gpus --steps training distillation --overlap $how --rows $kept/training --csv $OUT/scaling_training.csv"
unequal="$on --gpus $most --shares 0.01 0.19 --attention sparse --steps forward --overlap $how --rows $kept/unequal --csv $OUT/unequal.csv"
large="$on --gpus 1 $most --heads 40 --ffn 13824 --layers 2 --latents 21 90 160 --ways heads ring --steps forward --overlap $how --rows $kept/large --csv $OUT/scaling_14b.csv"
losses="$on --gpus 1 $most --heads 24 --head-size 64 --layers 4 --losses 20 --latents $latents --inner aot_eager --overlap $how --rows $kept/losses"

timed() { wanted "$1" || return; scaling "$1" "$2" $3; shown "$1" 16; table "$1" $3; }
timed forward 100 "$forward"
timed training 150 "$training"
wanted losses && scaling losses 190 $losses &
if wanted tests && [ -z "$on" ]; then # the longest, side by side; then the others, in what is left
    (
        tests "NCCL: copy engines" $first multigpu tests/parallel/test_engines.py &
        tests "NCCL: sharded attention" $second multigpu tests/parallel/test_sharded_attention.py &
        tests "NCCL: diffusers" $first multigpu tests/parallel/test_models.py &
        tests "NCCL: distillation, slow" $second "multigpu and slow" tests/distill/test_parallel.py &
        wait
        tests "NCCL: overlap" $first multigpu tests/parallel/test_overlap.py &
        tests "NCCL: context_parallel" $second multigpu tests/parallel/test_torch_context_parallel.py &
        tests "NCCL: distillation" $first "multigpu and not slow" tests/distill/test_parallel.py &
        tests "NCCL: recipe" $second multigpu tests/examples/test_finetune.py &
        tests "NCCL: sparge calibrate" $second multigpu tests/test_cli.py &
        wait
    ) &
fi
timed unequal 70 "$unequal"
timed 14B 90 "$large"
wait
shown losses 8
wanted losses && table losses $losses
for name in "copy engines" "sharded attention" diffusers "distillation, slow" overlap context_parallel distillation recipe "sparge calibrate"; do
    shown "NCCL: $name" 2
done
for file in scaling scaling_training scaling_14b; do
    [ ! -f "$OUT/$file.csv" ] || "$PYTHON" -W ignore "$here/scaling_model.py" --models --measured "$OUT/$file.csv" >>"$OUT/tables.txt"
done
rm -r "$kept"
