#!/usr/bin/env bash
# Makes the files of this folder again: bash results/make.sh [FOLDER with the WikiSQL and GSM8K files]
# Quality runs continue where they stopped. Nothing else should run on the machine while speed is measured.
set -euo pipefail
cd "$(dirname "$0")/.."
nld=.venv/bin/nld data=${1:-} out=results runs=results/runs

speed() {
    $nld compare --methods cold,greedy,transformers_greedy,peft_greedy,peft_mixed,cold_naive --prompts 2 --new-tokens 48 --rounds 3 --dtype bf16 --alpha 0.1 --beta 0.1 \
        --relative-to peft_greedy --compile --json $out/speed_compiled.json
    $nld compare --methods cold,greedy,beam,transformers_greedy,transformers_beam,transformers_lookup,peft_greedy,peft_mixed --prompts 2 --new-tokens 48 --rounds 3 --dtype bf16 --alpha 0.1 --beta 0.1 \
        --relative-to peft_greedy --json $out/speed_eager.json
}

# The dials of each task were chosen with `nld tune` on development items, see *_tune.json.
king_james() {
    [ -d $runs/king_james/adapter ] || $nld train-lora $runs/king_james --steps 200 --snapshots 12,25,50,100
    $nld tune --items 200 --betas=-0.2,0.1,0.2,0.3,0.5 --alphas 0.1 --batch 50 --json $out/king_james_tune.json
    $nld evaluate --arms greedy,cold:0.1:0.1,beam,nucleus:0.5,min_p:0.5,cold:0.1:0.5 --items 500 --batch 50 --json $out/king_james_test.json
    for s in 12 25 50 100; do
        $nld evaluate --adapter $runs/king_james/adapter-$s --steps $s --arms greedy,cold:0.1:0.1,cold:0.1:0.3 --items 200 --batch 50 --json $out/king_james_training.json
    done
    $nld evaluate --steps 200 --arms greedy,cold:0.1:0.1,cold:0.1:0.3 --items 200 --batch 50 --json $out/king_james_training.json
}

wikisql() {
    [ -d $runs/wikisql/adapter ] || $nld train-lora $runs/wikisql --task wikisql --data "$data" --steps 100 --snapshots 25
    $nld tune --task wikisql --data "$data" --adapter $runs/wikisql/adapter --items 200 --betas=-0.2,0.1,0.2,0.3,0.5 --alphas 0.1 --batch 50 --json $out/wikisql_tune.json
    $nld evaluate --task wikisql --data "$data" --adapter $runs/wikisql/adapter --arms greedy,cold:0.1:0.1,beam,nucleus:0.5,min_p:0.5 --items 500 --batch 50 --json $out/wikisql_test.json
}

speed
king_james
if [ -n "$data" ]; then wikisql; fi

# The shipped adapter's card carries its scores.
.venv/bin/python - <<'P'
from pathlib import Path
from npu_lora_decoding.show import quality_table, read_rows
card = Path('results/adapters/king_james/README.md')
card.write_text(card.read_text().split('\n## Scores')[0].rstrip() + '\n\n## Scores\n\n' + quality_table(read_rows('results/king_james_test.json')) + '\n')
P
