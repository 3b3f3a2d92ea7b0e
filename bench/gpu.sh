#!/usr/bin/env bash
# Everything that only a GPU can tell, on a bare CUDA machine with torch, triton and numpy:
#
#     bench/gpu.sh [OUTPUT_DIR]        (default bench/results)
#
# Nothing is installed: the package is linked together in a temporary folder; other packages may be
# offered by PYTHONPATH: transformers for the peers, pytest for the tests. What is missing is said.
# COMMIT names the commit where the copy has no history. Results are JSON files named by GPU and
# date, with logs beside them. Ends within 9 minutes. A part that fails or runs out of time does not
# lose the others; the exit status is then 1.
set -u
repo=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$repo/bench/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
python=${PYTHON:-python3}
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT

has() { "$python" -c "import $1" 2>/dev/null; }

has numpy || { echo "numpy is not installed: nothing runs without it" >&2; exit 2; }

mkdir "$work/fastelectra" # with kernels/ as fastelectra.kernels, as setup.py installs it
ln -s "$repo"/fastelectra/* "$repo/kernels" "$work/fastelectra/"
export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}"
flags=()
if ! has numba; then # the same functions then run as Python: too slow to time, so made beforehand
  echo "numba is not installed: throughput is measured with batches made beforehand"
  cp "$repo/bench/stand_ins/numba.py" "$work"
  flags+=(--no-data)
fi
tests=("$repo/tests/kernels/executed") # and of the others those that skip without a GPU
graphs=$repo/tests/training/test_graphs.py steps=$repo/tests/tasks/test_step.py
if has tokenizers; then tests+=("$graphs::test_a_gpu_makes_the_same_updates_of_replays"); fi
if has transformers; then tests+=("$steps::test_replays_on_a_gpu_are_the_same_steps"); fi
for package in transformers tokenizers pytest; do
  has "$package" || echo "$package is not installed: what needs it is left out, or fails"
done
has tokenizers || cp "$repo/bench/stand_ins/tokenizers.py" "$work"

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') || exit 2
name=$(tr 'A-Z ' 'a-z-' <<<"${gpu#NVIDIA }")-$(date -u +%F)

part() { # NAME SECONDS COMMAND…: never beyond 515 s from the start
  local label=$1 limit=$2 left=$((515 - SECONDS)) status=0
  shift 2
  limit=$((limit < left ? limit : left))
  printf '\n%s\n' "== $label, at $SECONDS s, for $limit s at most"
  if ((limit >= 5)); then
    (cd "$work" && timeout --signal=INT --kill-after=10 "$limit" "$@") 2>&1 | tee "$out/$name-$label.log"
    status=${PIPESTATUS[0]}
  else
    status=124
  fi
  ((status == 0)) || echo "$label: $( ((status == 124 || status == 137)) && echo out of time || echo "exit status $status")" \
    >>"$work/failed"
}

throughput() { # NAME SECONDS FLAG…
  local label=throughput-$1 limit=$2 plot=()
  shift 2
  has matplotlib && plot=(--plot "$out/$name-$label.png")
  part "$label" "$limit" "$python" "$repo/bench/throughput.py" --json "$out/$name-$label.json" \
    "${plot[@]}" "${flags[@]}" "$@"
}

compile() { # NAME FLAG…: leave the kernels of ours and of named peers in compilers' caches
  local label=compile-$1
  shift
  part "$label" 120 "$python" "$repo/bench/throughput.py" "${flags[@]}" --peers "$@" \
    --rounds 1 --block 1 --warmup 2
}

part nvidia-smi 10 nvidia-smi
part environment 20 "$python" "$repo/bench/measure.py"

xdist=()
has xdist && xdist=(-n 12)
small=(--size small --rounds 3 --block 40)
# base and large: several micro-batches to an update, as in a run
base=(--size base --tokens-per-step 131072 --micro-batch 32768 --rounds 3 --warmup 3 --block 3)
large=(--size large --tokens-per-step 65536 --micro-batch 16384 --rounds 3 --warmup 3 --block 2)
# none of this is timed, and most of it is the processor's: at once
compile small "${small[@]}" --peers compiled &
compile base "${base[@]}" --peers compiled &
compile large "${large[@]}" --tokens-per-step 4096 --micro-batch 4096 &
part tests 120 "$python" -m pytest -vv --tb=short \
  --continue-on-collection-errors "${xdist[@]}" "${tests[@]}" &
wait

peers=(--peers natural careful)
throughput base 70 "${base[@]}" "${peers[@]}" --profile
throughput small 45 "${small[@]}" "${peers[@]}" --profile
throughput large 70 "${large[@]}" "${peers[@]}"
throughput small-compiled 40 "${small[@]}" --peers compiled
throughput base-compiled 50 "${base[@]}" --block 2 --peers compiled
part attention 35 "$python" "$repo/bench/attention.py" --json "$out/$name-attention.json"
throughput base-largest 55 --size base --rounds 1 --block 5 "${peers[@]}" --largest
part kernels 150 "$python" "$repo/bench/kernels.py" --output "$out/$name-kernels" # saves row by row

echo "== done in $SECONDS s; results in $out"
[[ -e $work/failed ]] || exit 0
sed 's/^/failed: /' "$work/failed"
exit 1
