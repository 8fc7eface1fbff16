#!/usr/bin/env bash
# Builds, tests, sanitizes and measures the kernels on a machine with a GPU, within nine minutes.
#
#   benchmarks/gpu.sh [--only build|test|sanitize|kernel|step|tables]...  (or a list: build,test)
#
# "tables" runs the suites at --scale gpu as far as the time goes; it is left out unless it is named,
# and goes on where it was if OUT and WORK are those of the time before.
#
# Needs an NVIDIA GPU, CUDA's compiler and a Python that has torch; no network. From the environment:
#   OUT      folder of logs and results (benchmarks/results)
#   PYTHON   interpreter (python3)
#   DATA     folder of the data sets, for tables: text needs it, images are downloaded without it
#   WORK     folder of unfinished runs, for tables (runs/bench)
#   COMMIT   what to record where the sources come without their history
#   LIMIT    seconds in all (530)
#
# The sanitizer runs the tests marked gpu that have "sanitizer" in their name: it is slow.
# Exit status: 0 if nothing failed, 1 if a part failed, 2 if nothing could be tried.
set -euo pipefail

readonly ALL_PARTS="build test sanitize kernel step"
readonly KNOWN_PARTS="$ALL_PARTS tables"

fail() {
  printf 'gpu.sh: %s\n' "$*" >&2
  exit 2
}

chosen=""
while (($#)); do
  case $1 in
    --only)
      (($# > 1)) || fail "--only needs a part: one or more of ${KNOWN_PARTS// /, }"
      chosen+=" ${2//,/ }"
      shift 2
      ;;
    --only=*)
      value=${1#--only=}
      chosen+=" ${value//,/ }"
      shift
      ;;
    -h | --help)
      sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
      exit 0
      ;;
    *) fail "unknown argument '$1': only --only PART is known" ;;
  esac
done
read -ra wanted <<<"${chosen:-$ALL_PARTS}"
((${#wanted[@]})) || fail "--only names no part: choose from ${KNOWN_PARTS// /, }"
for part in "${wanted[@]}"; do
  [[ " $KNOWN_PARTS " == *" $part "* ]] || fail "no part '$part': choose from ${KNOWN_PARTS// /, }"
done
parts=()
for part in $KNOWN_PARTS; do
  if [[ " ${wanted[*]} " == *" $part "* ]]; then parts+=("$part"); fi
done

readonly limit=${LIMIT:-530}
[[ $limit =~ ^[1-9][0-9]*$ ]] || fail "LIMIT must be a number of seconds, got '$limit'"
readonly deadline=$(($(date +%s) + limit))
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-$(dirname "$0")/results}")
WORK=$(realpath -m "${WORK:-$(dirname "$0")/../runs/bench}")
if [[ -n ${DATA:-} ]]; then DATA=$(realpath -m "$DATA"); fi
cd "$(dirname "$0")/.."

command -v "$PYTHON" >/dev/null || fail "no interpreter '$PYTHON': name one in PYTHON"
# shellcheck disable=SC2016  # Python's words, not the shell's
device=$("$PYTHON" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"{sys.executable} has no torch ({error}): name a Python that has one in PYTHON")
if not torch.cuda.is_available():
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
    sys.exit(f"no CUDA device: torch {torch.__version__} {built} and sees no GPU. Run this on a "
             "machine with an NVIDIA GPU; `make test` runs everything that needs none")
print(*torch.cuda.get_device_capability(), torch.cuda.get_device_name(), sep="\t")
' 2>&1) || fail "$device"
device=$(tail -n 1 <<<"$device") # after what torch may warn about
IFS=$'\t' read -r major minor device <<<"$device"
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) ||
  driver=unknown
COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
export COMMIT
mkdir -p "$OUT"
printf '%s (compute capability %s.%s), driver %s, commit %s\n' \
  "$device" "$major" "$minor" "$driver" "$COMMIT"

records=() # part, result, seconds; part, result, seconds; ...
failed=0

record() {
  records+=("$1" "$2" "$3")
  case $2 in
    passed | skipped*) ;;
    *) failed=1 ;;
  esac
}

left() { echo $((deadline - $(date +%s))); }

# at_most SECONDS: what a part may take, all that is left where it is the only one.
at_most() {
  local rest
  rest=$(left)
  if ((${#parts[@]} == 1 || rest < $1)); then echo "$rest"; else echo "$1"; fi
}

# attempt NAME SECONDS LOG COMMAND...: runs a command within a time, and records how it went.
attempt() {
  local name=$1 seconds=$2 log=$3 begin status=0 result
  shift 3
  begin=$(date +%s)
  if ((seconds < 5)); then
    record "$name" "failed: no time left" 0
    return 1
  fi
  printf '%s ...\n' "$name"
  timeout --kill-after=5 "$seconds" "$@" >"$log" 2>&1 || status=$?
  case $status in
    0) result=passed ;;
    124 | 137) result="failed: stopped after $seconds s" ;;
    *) result="failed: status $status" ;;
  esac
  record "$name" "$result" $(($(date +%s) - begin))
  if ((status)); then
    printf -- '--- last lines of %s\n' "$log"
    tail -n 25 "$log"
    printf -- '---\n'
    return 1
  fi
}

build() {
  TORCH_CUDA_ARCH_LIST=$major.$minor LIGHTNING_MAT_CUDA=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    attempt build "$(at_most 240)" "$OUT/build.log" \
    "$PYTHON" -m pip install -v --no-build-isolation --no-deps --no-index -e .
}

# bash -c "$RUN_TESTS" PYTHON XML COMMAND...: runs pytest; fails also where no test ran.
# shellcheck disable=SC2016  # expanded by that bash
readonly RUN_TESTS='
set -eu
xml=$1; shift
"$@" --junitxml="$xml"
"$0" - "$xml" <<"END"
import sys
import xml.etree.ElementTree as tree

count = {key: 0 for key in ("tests", "skipped", "failures", "errors")}
for suite in tree.parse(sys.argv[1]).iter("testsuite"):
    for key in count:
        count[key] += int(suite.get(key, 0))
passed = count["tests"] - count["skipped"] - count["failures"] - count["errors"]
print(f"{passed} passed, {count}")
sys.exit(0 if passed else "no test ran on the GPU: see above why they were skipped")
END
'

gpu_tests() { grep -rlE 'mark\.gpu' tests --include='*.py' | sort; }

test_() {
  local files
  mapfile -t files < <(gpu_tests)
  attempt test "$(at_most 120)" "$OUT/gpu-tests.log" \
    bash -c "$RUN_TESTS" "$PYTHON" "$OUT/gpu-tests.xml" \
    "$PYTHON" -m pytest -q -m gpu "${files[@]}" || true
}

sanitize() {
  local files tool checks=(memcheck racecheck initcheck) waiting=3 stop rest sanitizer="" filter
  for tool in compute-sanitizer /usr/local/cuda*/bin/compute-sanitizer; do
    sanitizer=$(command -v "$tool") && break
  done
  if [[ -z $sanitizer ]]; then
    record sanitize "skipped: compute-sanitizer is not installed" 0
    return
  fi
  mapfile -t files < <(gpu_tests)
  stop=$(($(date +%s) + $(at_most 90)))
  for tool in "${checks[@]}"; do
    rest=$(((stop - $(date +%s)) / waiting))
    waiting=$((waiting - 1))
    # Only our own kernels; initcheck has to see who else writes to memory.
    filter=(--kernel-name kns=lightning_mat)
    if [[ $tool == initcheck ]]; then filter=(); fi
    # Without torch's cache every tensor is an allocation of its own, whose bounds can be checked.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 attempt "$tool" "$rest" "$OUT/$tool.log" \
      bash -c "$RUN_TESTS" "$PYTHON" "$OUT/$tool.xml" \
      "$sanitizer" --tool "$tool" --error-exitcode 9 "${filter[@]}" \
      "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu -k sanitizer "${files[@]}" || true
  done
}

kernel() {
  local rest
  rest=$(left)
  if [[ " ${parts[*]} " == *" step "* ]]; then rest=$((rest / 2)); fi
  # The last workload that starts needs time to end.
  attempt kernel "$rest" "$OUT/kernel.log" \
    "$PYTHON" benchmarks/kernel.py --device cuda --out "$OUT" \
    --seconds $((rest > 90 ? rest - 60 : rest / 3)) || return 0
  cat "$OUT/kernel.log"
}

step() {
  local rest
  rest=$(left)
  # BERT-base first, eager and compiled, in half of the time; then what the rest allows. The shares
  # that matter most come first; a model's last group needs time to end.
  attempt step-bert-base "$((rest * 3 / 5))" "$OUT/step-bert-base.log" \
    "$PYTHON" benchmarks/step.py --device cuda --out "$OUT" --model bert-base --precision bf16 \
    --compile both --shares 1 .25 .5 .1 .75 0 --time-limit $((rest / 2)) &&
    cat "$OUT/step-bert-base.log"
  rest=$(left)
  attempt step "$rest" "$OUT/step.log" \
    "$PYTHON" benchmarks/step.py --device cuda --out "$OUT" --model all --precision bf16 \
    --shares 1 .25 .5 .1 .75 0 --time-limit $((rest > 60 ? rest - 40 : rest / 3)) &&
    cat "$OUT/step.log"
  return 0
}

tables() {
  local suite rest data=()
  if [[ -n ${DATA:-} ]]; then data=(--data "$DATA"); fi
  for suite in bert vgg switch pareto; do
    rest=$(left)
    # The suite stops by itself; what it does last (a test, a checkpoint) needs time to end.
    attempt "tables-$suite" "$rest" "$OUT/tables-$suite.log" \
      "$PYTHON" -m benchmarks "$suite" --scale gpu --device cuda --results "$OUT" \
      --work "$WORK" "${data[@]}" \
      --time-limit "$((rest > 90 ? rest - 45 : rest / 2))s" || return 0
    cat "$OUT/tables-$suite.log"
    if (($(left) < 20)); then return 0; fi
  done
}

for part in "${parts[@]}"; do
  case $part in
    build)
      if ! build; then
        for name in "${parts[@]:1}"; do record "$name" "failed: not run, the build failed" 0; done
        break
      fi
      ;;
    test) test_ ;;
    sanitize) sanitize ;;
    kernel) kernel ;;
    step) step ;;
    tables) tables ;;
  esac
done

"$PYTHON" - "$OUT/gpu.json" "$device" "$major.$minor" "$driver" "$COMMIT" "${records[@]}" <<'END'
import json
import sys
from datetime import datetime, timezone

path, device, capability, driver, commit, *records = sys.argv[1:]
parts = {
    name: {"result": result, "seconds": int(seconds)}
    for name, result, seconds in zip(*[iter(records)] * 3)
}
result = {
    "schema": 1,
    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "device": device,
    "capability": capability,
    "driver": driver,
    "commit": commit,
    "parts": parts,
}
with open(path, "w", encoding="utf-8") as file:
    json.dump(result, file, indent=2)
    file.write("\n")
print(f"\n{device}, driver {driver}, commit {commit}; {path}")
print(f"{'part':12}{'seconds':>8}  result")
for name, row in parts.items():
    print(f"{name:12}{row['seconds']:8}  {row['result']}")
END
exit "$failed"
