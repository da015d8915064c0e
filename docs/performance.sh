#!/usr/bin/env bash
# Measures what performance.md tells of one card, each part in a process of its own, as pools of most of a card want:
#
#     docs/performance.sh FOLDER [PART ...]
#
# FOLDER/PART.txt gets what a part prints; parts that have ended well are not run again. Without PART all of them run.
# SPARSEJAX is the command to use (default: sparsejax).
set -u
parts() {
  cat <<'PARTS'
decode-attention   bench kernels decode_attention
prefill-attention  bench kernels prefill_attention
linear             bench kernels gated_linear add_linear
others             bench kernels rotate_and_store add_rms_norm store_kv
steps-profile      bench latency --shapes 1x1024,64x2048 --chunk 8192 --steps 40 --profile
steps-2k           bench latency --shapes 16x2048,32x2048,128x2048 --chunk 8192 --steps 40
steps-256x2k       bench latency --shapes 256x2048 --chunk 8192 --steps 40
steps-8x32k        bench latency --shapes 8x32768 --chunk 8192 --steps 40
steps-16x32k       bench latency --shapes 16x32768 --chunk 8192 --steps 40
steps-1x128k       bench latency --shapes 1x131072 --chunk 8192 --steps 40
steps-per-head     bench latency --shapes 256x1024 --chunk 8192 --steps 40 --granularity per_head --profile
traces             bench throughput --trace mix600,512x1024x256,prefix64x8k --chunk 8192 --max-mixed-tokens 2048
trace-24x32k       bench throughput --trace 24x32k --chunk 8192
itl                bench throughput --trace itl32k --pool-gib 60 --chunk 8192 --max-mixed-tokens 2048
itl-128            bench throughput --trace itl32k --pool-gib 60 --chunk 8192 --max-mixed-tokens 128
start-cold         bench startup --compilation-cache FOLDER/cache --greedy-only --max-model-len 32768 --max-num-seqs 256 --chunk 8192 --max-mixed-tokens 2048
start-warm         bench startup --compilation-cache FOLDER/cache --greedy-only --max-model-len 32768 --max-num-seqs 256 --chunk 8192 --max-mixed-tokens 2048
evict-prompts      bench latency --shapes 1x32768 --steps 10 --chunk 8192 --pool-gib 6 --budget-tokens 2048 --method snapkv,compactor,kv_compress,kvzip --compare-dense
evict-16x32k       bench latency --shapes 16x32768 --steps 40 --chunk 8192 --pool-gib 24 --method snapkv --budget-tokens 2048
evict-1x128k       bench latency --shapes 1x131072 --steps 40 --chunk 8192 --pool-gib 20 --method snapkv --budget-tokens 4096
evict-h2o          bench latency --shapes 64x2560 --steps 60 --chunk 8192 --pool-gib 24 --method h2o --budget-tokens 2048 --compare-dense 2048
evict-24x32k       bench throughput --trace 24x32k --chunk 8192 --pool-gib 100 --method snapkv --budget-tokens 2048
evict-16gb         bench throughput --trace 256x2000x2000,256x6000x500 --chunk 8192 --pool-gib 14.9 --method kv_compress --keep-fraction 0.0625 --interval-tokens 128
evict-16gb-dense   bench throughput --trace 256x2000x2000,256x6000x500 --chunk 8192 --pool-gib 14.9 --max-num-seqs 48
PARTS
}
folder=${1:?"where to? docs/performance.sh FOLDER [PART ...]"}
shift
mkdir -p "$folder"
for wanted in "$@"; do
  parts | grep -q "^$wanted " || { echo "no part is called $wanted. There are: $(parts | cut -d' ' -f1 | xargs)" >&2; exit 2; }
done
failed=0
while read -r part command; do
  [[ $# -eq 0 || " $* " == *" $part "* ]] || continue
  [[ -e $folder/$part.txt ]] && continue
  echo "$part: sparsejax $command"
  SECONDS=0
  # shellcheck disable=SC2086
  if ${SPARSEJAX:-sparsejax} ${command//FOLDER/$folder} >"$folder/$part.unfinished" 2>&1 </dev/null; then
    mv "$folder/$part.unfinished" "$folder/$part.txt"
    echo "  $SECONDS s"
  else
    echo "  failed after $SECONDS s: see $folder/$part.unfinished" >&2
    failed=1
  fi
done < <(parts)
exit $failed
