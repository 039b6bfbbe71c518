#!/bin/sh
# Everything that wants several GPUs, four or else two, in some 450 s: scaling, tests under NCCL, losses, unequal heads,
# Wan-14B's shape.
#   PYTHON=python OUT=folder sh benchmarks/scaling_on_gpus.sh [--tiny] [scaling] [tests] [unequal] [14B]
# --tiny: processes over gloo, to try it; no names: all parts, what matters most first. Each part has its time ($SCALING
# seconds for the first), all have $LIMIT seconds; what has used it up is ended with all its processes, and the rows that
# it measured stand. Tests and losses, which are not timed, run at the same time, each test file on a pair of GPUs.
PYTHON=${PYTHON:-python} OUT=${OUT:-.} LIMIT=${LIMIT:-580} SCALING=${SCALING:-260}
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
tests() { part "$1" 200 "$2" "$PYTHON" -m pytest --tb=line -o timeout=150 -m "$3" "$4"; }
wanted() { [ -z "$parts" ] || case " $parts " in *" $1 "*) ;; *) false ;; esac; }

on="" gpus="1 4 2" all=0,1,2,3 first=0,1 second=2,3 latents="16 32 32" graphs=--graphs
[ "$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")" -ge 4 ] || gpus="1 2" all=0,1 second=0,1
[ "$1" = --tiny ] && { on="--device cpu --tiny" gpus="1 2" latents="4 32 32" graphs=""; shift; }
parts=$*
most=${gpus#1 } most=${most%% *}
small="$on --gpus $gpus $graphs --overlap on first thirds --rows $kept/small --csv $OUT/scaling.csv"
losses="$on --gpus 1 $most --heads 24 --head-size 64 --layers 4 --losses 20 --latents $latents --inner aot_eager --rows $kept/losses"
unequal="$on --gpus $most --shares 0.01 0.19 --attention sparse --steps forward --rows $kept/unequal --csv $OUT/unequal.csv"
large="$on --gpus 1 $most --heads 40 --ffn 13824 --layers 2 --latents 21 90 160 --ways heads ring --steps forward --rows $kept/large --csv $OUT/scaling_14b.csv"

wanted scaling && scaling "scaling" "$SCALING" $small
shown "scaling" 24
wanted scaling && table "scaling" $small &
if wanted tests; then
    if [ -z "$on" ]; then
        tests "NCCL: sharded attention" $first multigpu tests/parallel/test_sharded_attention.py &
        tests "NCCL: context_parallel" $second multigpu tests/parallel/test_torch_context_parallel.py &
        tests "NCCL: diffusers" $first multigpu tests/parallel/test_models.py &
        tests "NCCL: distillation, slow" $second "multigpu and slow" tests/distill/test_parallel.py &
        tests "NCCL: distillation" $first "multigpu and not slow" tests/distill/test_parallel.py &
        tests "NCCL: recipe" $second multigpu tests/examples/test_finetune.py &
        tests "NCCL: overlap" $first multigpu tests/parallel/test_overlap.py &
        tests "NCCL: sparge calibrate" $second multigpu tests/test_cli.py &
    fi
    scaling "losses" 150 $losses &
    wait
    for name in "sharded attention" context_parallel diffusers "distillation, slow" distillation recipe overlap "sparge calibrate"; do
        shown "NCCL: $name" 2
    done
    shown "losses" 8
    table "losses" $losses &
fi
for name in unequal large; do
    eval "those=\$$name"
    case $name in large) wanted 14B ;; *) wanted $name ;; esac && rest="${rest:+$rest + }$those"
done
if [ -n "$rest" ]; then
    scaling "unequal heads, 14B" 150 $rest
    shown "unequal heads, 14B" 16
    for some in "$unequal" "$large"; do table "unequal heads, 14B" $some & done
fi
wait
for file in scaling scaling_14b; do
    [ ! -f "$OUT/$file.csv" ] || "$PYTHON" -W ignore "$here/scaling_model.py" --models --measured "$OUT/$file.csv" >>"$OUT/tables.txt"
done
rm -r "$kept"
